"""Birdie's objectives, masked input, and odds that follow rewards."""

import json

import jax
import numpy as np
import pytest

from configs import birdie_stdlib
from configs.hmt import HMTExperiment
from configs.saved import from_json
from objectives import objective_of
from runtime.mesh import MeshConfig, make_mesh
from tasks.birdie import COUNT, OBJECTIVES, Ids, kind, row, shortest_row
from tasks.lm import LMTask, LMTaskConfig
from tasks.mixture import MixtureConfig
from tasks.reward import DELAY, RewardConfig, Rewarded, reward, total_reward
from tests.experiments import write_corpus

IDS = Ids(257)
NAMES = [name for name, objective in OBJECTIVES.items() if objective is not None]


def parts(name, length, seed=0):
    """The text that was used, the input, the label, and the fields of the row."""
    objective = OBJECTIVES[name]
    text = np.random.default_rng((seed, length)).integers(0, 256, length).astype(np.int32)
    fields = row(objective, np.random.default_rng(seed), text, IDS)
    real = fields["segment_ids"] == 1
    whole = np.append(fields["tokens"][real], _next(fields)[real][-1])
    begin = int(np.flatnonzero(whole == IDS.begin)[0])
    assert whole[0] == IDS.marker(objective.kind)
    label = whole[begin + 1 :]
    if objective.kind != "prefix_lm":
        assert label[-1] == IDS.end
        label = label[:-1]
    used = text[: objective.fit(length)]
    assert fields["prefix"].sum() == begin and (np.diff(fields["prefix"].astype(int)) <= 0).all()
    np.testing.assert_array_equal(fields["weights"] > 0, real & (np.arange(length) >= begin))
    np.testing.assert_array_equal(fields["targets"][fields["weights"] > 0], whole[begin + 1 :])
    np.testing.assert_array_equal(fields["positions"][real], np.arange(real.sum()))
    return used, whole[1:begin], label, fields


def _next(fields):
    return np.where(fields["weights"] > 0, fields["targets"], np.roll(fields["tokens"], -1))


def _sentinel(tokens):
    return tokens >= IDS.sentinel(0)


def _pieces(tokens):
    """{sentinel: the tokens after it}."""
    at = np.flatnonzero(_sentinel(tokens))
    return {int(tokens[a]): tokens[a + 1 : b].tolist() for a, b in zip(at, [*at[1:], len(tokens)])}


@pytest.mark.parametrize("name", NAMES)
def test_the_label_can_be_told_from_the_input(name):
    for length in (*range(shortest_row(name), shortest_row(name) + 12), 257, 500):
        for seed in range(3 if length == 500 else 1):
            text, given, label, fields = parts(name, length, seed)
            of = kind(name)
            if of == "prefix_lm":
                np.testing.assert_array_equal(np.concatenate([given, label]), text)
            elif of == "copy":
                np.testing.assert_array_equal(given, text)
            elif of == "deshuffle":
                np.testing.assert_array_equal(np.sort(given), np.sort(text))
                assert (given != text).mean() <= (0.5 if "50" in name else 1.0) + 1 / len(text)
            elif of == "infill":
                hidden = _pieces(label)
                filled = [hidden[int(t)] if t in hidden else [int(t)] for t in given]
                np.testing.assert_array_equal(sum(filled, []), text)
            elif of == "autoencode":
                np.testing.assert_array_equal(label, text)
                kept = np.sort(given[~_sentinel(given)])
                assert np.isin(kept, text).all() and _sentinel(given).sum() >= 1
            else:
                _check_selection(text, given, label, before="before" in name)
            if of in ("copy", "deshuffle", "autoencode"):
                np.testing.assert_array_equal(label, text)
    assert (fields["segment_ids"] == 1).mean() > (0.8 if kind(name) == "select" else 0.98)


def _check_selection(text, given, label, before):
    middle = int(np.flatnonzero(given == IDS.context)[0])
    asked, seen = (given[:middle], given[middle + 1 :]) if before else (given[middle + 1 :], given[:middle])
    np.testing.assert_array_equal(seen, text)
    questions, answers = _pieces(asked), _pieces(label)
    assert questions.keys() == answers.keys()
    for sentinel, answer in answers.items():
        cut = questions[sentinel].index(IDS.between)
        left, right = questions[sentinel][:cut], questions[sentinel][cut + 1 :]
        wanted = [*left, *answer, *right]
        assert 1 <= len(left) <= 8 and 1 <= len(right) <= 8 and 4 <= len(answer) <= 32
        assert any(text[i : i + len(wanted)].tolist() == wanted for i in range(len(text)))


def test_shares_and_spans_are_those_asked_for():
    text, given, label, _ = parts("infill_15_3", 500)
    spans = _pieces(label)
    hidden = sum(len(piece) for piece in spans.values())
    assert hidden == round(0.15 * len(text)) and len(spans) == round(hidden / 3)
    moved = np.mean([np.mean(np.not_equal(*parts("deshuffle_100", 300, seed)[:2])) for seed in range(4)])
    assert moved > 0.9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("mixture") / "corpus")


def task(corpus, **fields):
    mixture = MixtureConfig(**fields)
    return LMTask(
        LMTaskConfig(
            source=str(corpus),
            seq_len=64,
            batch_size=6,
            cache_dir=str(corpus.parent / "cache"),
            mixture=mixture,
        )
    )


def test_rows_of_a_mixture(corpus):
    names = ("next_token", "copy", "infill_15_3")
    mixed, plain = task(corpus, objectives=names, eval_batches=1), task(corpus)
    assert plain.mixture is None and plain.vocab_size == 257
    assert mixed.vocab_size == 257 + COUNT == len(mixed.byte_lengths)
    counts = dict.fromkeys(names, 0)
    for step in range(30):
        batch, text = mixed.train()[step], plain.train()[step]
        for number, marker in enumerate(batch["tokens"][:, 0]):
            if marker < 257:
                counts["next_token"] += 1
                for field in text:
                    np.testing.assert_array_equal(batch[field][number], text[field][number])
                assert not batch["prefix"][number].any()
            else:
                name = {IDS.marker("copy"): "copy", IDS.marker("infill"): "infill_15_3"}[int(marker)]
                counts[name] += 1
                assert batch["prefix"][number].any()
    assert min(counts.values()) > 40  # of 180
    whole = mixed.train()[7]
    for a, b in ((0, 2), (2, 6)):
        part = mixed.train(slice(a, b))[7]
        for field in whole:
            np.testing.assert_array_equal(part[field], whole[field][a:b])
    sets = mixed.eval_sets()
    assert list(sets) == ["validation", *names] and len(sets["copy"]) == 1
    assert (sets["copy"][0]["tokens"][:, 0] == IDS.marker("copy")).all()
    np.testing.assert_array_equal(sets["next_token"][0]["tokens"], sets["validation"][0]["tokens"])


def test_odds_are_kept_and_masks_hide_input_alone(corpus):
    only = task(corpus, objectives=("copy", "prefix_lm"), odds=(0.0, 2.0))
    assert (only.train()[3]["tokens"][:, 0] == IDS.marker("prefix_lm")).all()
    masked, plain = task(corpus, mask_share=0.15), task(corpus)
    hidden = []
    for step in range(20):
        batch, text = masked.train()[step], plain.train()[step]
        np.testing.assert_array_equal(batch["targets"], text["targets"])
        np.testing.assert_array_equal(batch["weights"], text["weights"])
        there = batch["tokens"] == IDS.hidden
        np.testing.assert_array_equal(batch["tokens"][~there], text["tokens"][~there])
        hidden.append(there[text["segment_ids"] > 0].mean())
    assert abs(np.mean(hidden) - 0.15) < 0.02
    assert "prefix" not in masked.train()[0] and list(masked.eval_sets()) == ["validation"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": ("copying",)}, "has 'copying'; there are next_token"),
        ({"objectives": ("select_after",)}, "needs task.seq_len=64 to be at least 119"),
        ({"objectives": ("copy",), "odds": (1.0, 2.0)}, "task.mixture.odds"),
        ({"mask_share": 1.0}, "task.mixture.mask_share=1.0"),
        ({"objectives": ("copy",), "reward": RewardConfig(on=True)}, "task.mixture.eval_batches"),
    ],
)
def test_a_mixture_that_cannot_work_is_named(corpus, fields, message):
    with pytest.raises(ValueError, match=message):
        task(corpus, **fields)


def test_a_mixture_is_for_plain_language_models():
    config = HMTExperiment()
    config.task.mixture.objectives = ("copy",)
    with pytest.raises(ValueError, match="a run of kind 'hmt'"):
        objective_of(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))


def test_configs_are_valid_and_read_back():
    for argument in ("mixture", "rewarded,hybrid", "prefix", "meap,attention"):
        config = birdie_stdlib.get_config(argument)
        config.validate()
        config.task.mixture.validate(config.task.seq_len)
        assert from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="prefix: one with Mamba-2"):
        birdie_stdlib.get_config("prefix,attention")


def test_rewards_are_those_of_the_paper():
    old, new = np.array([2.0, 2.0, 2.0, np.nan, 1.0]), np.array([1.9, 2.0, 2.1, 1.0, 0.999])
    found = reward(old, new)
    fallen, size = 0.1 / 2, np.sqrt(2 * 1.9)
    assert found[0] == pytest.approx(100 * np.e * np.tanh(np.e * size * fallen**3), rel=1e-6)
    assert found[1] == found[3] == 0 and found[2] < 0 and 0 < found[4] < 1e-5
    assert (reward(np.array([3.0]), np.array([1.0])) == 1).all()
    # Two settings of one kind count as much as one of another.
    assert total_reward(np.array([1.0, 0.0, 0.5]), ["infill", "infill", "copy"]) == 1.0


def test_odds_follow_rewards_and_the_record_alone(tmp_path):
    """Copying gets better the more of it there is; the rest never does."""
    names = ("next_token", "copy", "infill_15_3")
    config = RewardConfig(on=True, uniform_steps=30)
    live, records, copying = Rewarded(config, names), [], 4.0
    for step in range(10, 310, 10):
        copying *= 1 - 0.06 * live.odds(step - 1)[1]
        losses = {"next_token/loss": 2.0, "copy/loss": copying, "infill_15_3/loss": 3.0}
        records.append({"step": step, **losses, "validation/loss": 2.0})
        live.observe(records)
    np.testing.assert_array_equal(live.odds(29), np.full(3, 1 / 3))
    assert live.odds(10**6)[1] > 0.6 and live.odds(10**6).sum() == pytest.approx(1)
    assert (live.odds(50 + DELAY - 1) == live.odds(40 + DELAY)).all()
    assert (live.odds(50 + DELAY) != live.odds(40 + DELAY)).any()
    again = Rewarded(config, names)
    text = "\n".join(json.dumps(r) for r in [{"step": 5, "train/loss": 3.0}, *records])
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 9, "cut')
    again.read(tmp_path / "metrics.jsonl")
    for step in range(0, 400, 7):
        np.testing.assert_array_equal(again.odds(step), live.odds(step))
    nothing = Rewarded(config, names)
    nothing.read(tmp_path / "none.jsonl")
    np.testing.assert_array_equal(nothing.odds(500), np.full(3, 1 / 3))

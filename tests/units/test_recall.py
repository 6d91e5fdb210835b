"""Generators of recall tasks: their laws, oracles that are always right, evaluation apart from training."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import copying as copying_config
from configs import induction as induction_config
from configs import mqar as mqar_config
from configs import phonebook as phonebook_config
from configs.saved import from_json
from tasks.recall import RecallTask, RecallTaskConfig, draws
from tasks.recall.copying import CopyingSpec
from tasks.recall.in_context import InContextSpec
from tasks.recall.induction import InductionSpec
from tasks.recall.mqar import SETS, MQARSpec
from tasks.recall.phonebook import PhonebookSpec
from tasks.recall.repeat import RepeatSpec
from tests.conftest import GOLDEN

OFFICIAL = json.loads((GOLDEN / "mqar_stats.json").read_text())["sets"]
N = 40
LAWS = [
    (MQARSpec(vocab_size=64), (32, 6)),
    (MQARSpec(vocab_size=65, random_non_queries=False, num_passes=2), (32, 4)),
    (MQARSpec(vocab_size=40, updates=3), (32, 5)),
    (MQARSpec(vocab_size=64, disjoint_pairs=True), (48, 12)),
    *((CopyingSpec(variant, 8), (30, 5)) for variant in ("classic", "selective", "mad", "mad_selective")),
    *((RepeatSpec(variant, 6, 8), (64, 12)) for variant in ("copy", "prefix", "suffix", "duplicate")),
    (RepeatSpec("prefix", 3, 9, 2, 4), (80, 20)),
    (InductionSpec(), (24, 1)),
    (PhonebookSpec(), (0, 6)),
    (PhonebookSpec("reversed", shots=0, asked=3), (300, 5)),
    (InContextSpec(), (64, 8)),
    (InContextSpec(24, 8, 0.4), (64, 5)),
]


def name(law):
    return f"{type(law).__name__}-{getattr(law, 'variant', getattr(law, 'order', ''))}"


def made(law, size, held_out, rows=N, seed=0):
    law.check(*size)
    u = draws.uniforms((seed, held_out), np.arange(rows), law.width(*size))
    return law.make(u, *size, held_out)


def test_questions_of_mqar_stand_where_the_official_generator_puts_them():
    rows = 1500
    for known in OFFICIAL:
        size, k, space = (known["T"], known["K"]), known["K"], known["space"]
        batch = made(MQARSpec(known["V"], known["power_a"]), size, False, rows)
        asked = np.nonzero(batch["distance"])[1].reshape(rows, k)
        slots = (asked - 2 * k) // 2
        noise = 3.5 * np.sqrt(1 / rows + 1 / known["n"])
        p = known["p_slot0_used"]
        assert abs((slots == 0).any(1).mean() - p) <= noise * np.sqrt(p * (1 - p)) + 1e-3
        assert abs(slots.mean() - known["mean_slot"]) <= noise * slots.std() / np.sqrt(k) + 1e-9
        found = np.quantile(slots / space, [0.1, 0.25, 0.5, 0.75, 0.9])
        np.testing.assert_allclose(found, known["slot_fraction_deciles"], atol=1.5 / space + 0.012)
        gaps = batch["distance"][batch["distance"] > 0]
        error = noise * gaps.std() / np.sqrt(k)
        assert abs(gaps.mean() - known["mean_gap_tokens_key_to_query"]) <= error


@pytest.mark.parametrize(("law", "size"), LAWS, ids=lambda v: v if isinstance(v, tuple) else name(v))
@pytest.mark.parametrize("held_out", [False, True])
def test_the_oracle_is_always_right_and_answers_stand_where_they_are_said_to(law, size, held_out):
    batch = made(law, size, held_out)
    tokens, asked = batch["tokens"], batch["distance"] > 0
    assert tokens.shape == (N, law.fitted(*size)[0] if size[0] == 0 else size[0])
    assert asked.any(1).all() and tokens.min() >= 0 and tokens.max() < law.vocab_size
    counted = batch["weights"] > 0
    assert (counted | ~asked).all() and (batch["segment_ids"] > 0)[counted].all()
    np.testing.assert_array_equal(law.oracle(tokens, size[1])[counted], batch["targets"][counted])
    row, place = np.nonzero(asked)
    source = place + 1 - batch["distance"][asked]
    assert (source >= 0).all()
    np.testing.assert_array_equal(tokens[row, source], batch["targets"][asked])
    np.testing.assert_array_equal(batch["segment_ids"][row, source], batch["segment_ids"][asked])
    assert (batch["positions"] >= 0).all()


@pytest.mark.parametrize(("law", "size"), LAWS, ids=lambda v: v if isinstance(v, tuple) else name(v))
def test_guessing_is_right_as_often_as_chance_says(law, size):
    """The most frequent answer, counted on other rows; few-letter strings are told a little by their sums."""
    rows = 600
    answers = [b["targets"][b["distance"] > 0] for b in (made(law, size, False, rows, s) for s in (1, 2))]
    counts = np.bincount(answers[0], minlength=law.vocab_size) / len(answers[0])
    digits = np.array([counts[ord(str(d))] for d in range(10)]) if law.vocab_size == 257 else None
    guess = (answers[1] == counts.argmax()).mean()
    if digits is None:
        assert abs(guess - law.chance(size[1])) < 0.5 * law.chance(size[1])
    else:  # a tenth each, and the first of ten digits among 6..9
        np.testing.assert_allclose(digits, [0.09] * 6 + [0.115] * 4, atol=0.015)
        assert law.chance(size[1]) == pytest.approx((0.25 + 9 * 0.1) / 10)


def test_rows_depend_on_their_numbers_alone():
    whole = draws.uniforms((3, 1), np.arange(2**40, 2**40 + 30), 7)
    assert whole.shape == (30, 7) and 0 <= whole.min() < whole.max() < 1
    order = np.array([5, 6, 7, 3, 29, 0])
    np.testing.assert_array_equal(draws.uniforms((3, 1), 2**40 + order, 7), whole[order])
    assert not np.isin(draws.uniforms((3, 2), 2**40 + order, 7), whole).any()


def test_draws_follow_their_laws():
    u = np.random.default_rng(0).random((6000, 3))
    pairs = draws.distinct(u[:, :2], 3)
    counts = np.bincount(pairs @ [3, 1], minlength=9)
    np.testing.assert_allclose(counts[[1, 2, 3, 5, 6, 7]] / 6000, 1 / 6, atol=0.02)
    order = draws.weighted_order(u, np.array([4.0, 2.0, 1.0]), 2)
    first = np.bincount(order[:, 0]) / 6000
    np.testing.assert_allclose(first, [4 / 7, 2 / 7, 1 / 7], atol=0.02)
    second = np.bincount(order[order[:, 0] == 0, 1], minlength=3)
    np.testing.assert_allclose(second[1] / second.sum(), 2 / 3, atol=0.03)


def test_strings_of_evaluation_are_never_those_of_training():
    """All 27 strings of three letters: 9 of evaluation, 18 of training, all equally likely."""
    counts = {}
    for held_out in (False, True):
        batch = made(CopyingSpec("classic", 5), (6, 3), held_out, 3000)
        counts[held_out] = np.bincount((batch["tokens"][:, :3] - 1) @ [9, 3, 1], minlength=27) / 3000
    assert ((counts[True] > 0) != (counts[False] > 0)).all() and (counts[True] > 0).sum() == 9
    np.testing.assert_allclose(counts[True][counts[True] > 0], 1 / 9, atol=0.02)
    np.testing.assert_allclose(counts[False][counts[False] > 0], 1 / 18, atol=0.015)

    books = {held_out: _surnames(made(PhonebookSpec(), (0, 40), held_out)) for held_out in (False, True)}
    assert all(len(set(names)) == 40 for names in [*books[True], *books[False]])
    assert not set(sum(books[True], [])) & set(sum(books[False], []))

    for held_out in (False, True):
        batch = made(MQARSpec(64, disjoint_pairs=True), (48, 12), held_out)
        keys, values = batch["tokens"][:, :24:2], batch["tokens"][:, 1:24:2]
        assert ((values - keys) % 2 == (0 if held_out else 1)).all()
        assert all(len(set(row)) == 12 for row in [*keys.tolist(), *values.tolist()])


def _surnames(batch):
    text = [bytes(row[1:].astype(np.uint8).tolist()).decode() for row in batch["tokens"]]
    return [[line[7:11] for line in book.split("\n")[:40]] for book in text]


def test_pairs_of_mqar():
    zeros = made(MQARSpec(64, random_non_queries=False), (40, 5), False)["tokens"]
    assert ((zeros[:, 10:] > 0).sum(1) == 5).all() and (zeros[:, 11::2] == 0).all()
    assert (np.sort(zeros[:, :10:2], 1) == np.sort(zeros[:, 10:][zeros[:, 10:] > 0].reshape(N, 5), 1)).all()
    twice = made(MQARSpec(64, num_passes=2), (40, 5), False)["tokens"]
    np.testing.assert_array_equal(twice[:, :10], twice[:, 10:20])
    changed = made(MQARSpec(64, updates=2), (40, 5), False)["tokens"]
    for row in changed.tolist():
        told = dict(zip(row[:10:2], row[1:10:2]))
        again = dict(zip(row[10:14:2], row[11:14:2]))
        assert len(again) == 2 and all(value != told[key] for key, value in again.items())


def test_strings_to_repeat_read_as_they_are_written():
    letters = np.array(list("abcdefgh$|.*"))
    for variant, form in (("copy", "${0}|{0}."), ("prefix", "${2}|{0}|{1}."), ("suffix", "${0}|{2}{1}.")):
        batch = made(RepeatSpec(variant, 8, 6, 2), (60, 9), False)
        for row, ids in zip(batch["tokens"], batch["segment_ids"]):
            text = "".join(letters[row])
            examples = [part + "." for part in text.rstrip("*").split(".")[:-1]]
            assert len(examples) == ids.max() >= 2 and set(text[(ids > 0).sum() :]) <= {"*"}
            for example in examples:
                parts = example[1:-1].split("|")
                string = parts[1] if variant == "prefix" else parts[0]
                gram = parts[0] if variant == "prefix" else parts[1][:2]
                rest = string.split(gram, 1)[1] if variant != "copy" else ""
                assert example == form.format(string, rest, gram) and 6 <= len(string) <= 9
    doubled = made(RepeatSpec("duplicate", 26, 8, 3), (60, 12), True)["tokens"][:, 1:13]
    for row in doubled.tolist():
        grams = [tuple(row[i : i + 3]) for i in range(10)]
        assert len(set(grams)) < 10


@pytest.mark.parametrize(
    ("law", "size", "message"),
    [
        (MQARSpec(), (64, 17), "64 tokens have no room for 17 pairs .* at least 68"),
        (MQARSpec(16), (64, 8), "vocab_size=16 has 7 keys for 8 pairs; raise it to at least 18"),
        (MQARSpec(power_a=0.0), (64, 8), "power_a=0.0"),
        (MQARSpec(updates=9), (64, 8), "updates=9"),
        (CopyingSpec("random"), (64, 8), "variant='random' is unknown; use one of classic"),
        (CopyingSpec(), (15, 8), "15 tokens have no room for 8 letters twice: 16"),
        (RepeatSpec(), (50, 30), "63 would do"),
        (RepeatSpec("prefix", shortest=3), (100, 30), "shortest=3 must lie between 4"),
        (InductionSpec(), (2, 1), "at least 3"),
        (PhonebookSpec(), (100, 20), "100 bytes have no room for 20 entries; 555 would do"),
        (PhonebookSpec(), (0, 2), "2 entries: 3"),
        (PhonebookSpec(), (0, 5000), "5000 entries"),
        (InContextSpec(noise=0.1), (64, 8), "noise_vocab=0"),
        (InContextSpec(), (64, 9), "9 keys, but vocab_size=16"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(law, size, message):
    with pytest.raises(ValueError, match=message):
        law.check(*size)


def task(**fields):
    config = RecallTaskConfig(mqar=MQARSpec(vocab_size=32), train_sizes=((16, 2), (32, 4)), batch_size=4)
    return RecallTask(dataclasses.replace(config, **{"train_rows": (32,), "eval_rows": 20, **fields}))


def same(a, b):
    assert a.keys() == b.keys()
    for field in a:
        np.testing.assert_array_equal(a[field], b[field])


def test_batches_depend_on_the_step_alone_and_not_on_who_asks():
    data = task().train()
    shapes = {data[s]["tokens"].shape for s in range(12)}
    assert shapes == {(8, 16), (4, 32)} and task().tokens_per_step == 128
    for step in (0, 1, 5, 10**9):
        whole = task().train()[step]
        parts = [task().train(slice(a, b))[step] for a, b in ((0, 1), (1, 4))]
        same(whole, {f: np.concatenate([p[f] for p in parts]) for f in whole})
    assert not np.array_equal(task(seed=1).train()[0]["tokens"], data[0]["tokens"])


def test_an_epoch_has_every_row_once():
    """16 short rows in 4 batches... of 32 rows each size: 4 + 8 steps an epoch."""
    for fresh in (False, True):
        data = task(fresh=fresh).train()
        epochs = [[data[e * 12 + s]["tokens"] for s in range(12)] for e in range(2)]
        for width in (16, 32):
            rows = [{t.tobytes() for b in epoch if b.shape[1] == width for t in b} for epoch in epochs]
            assert len(rows[0]) == 32 and (rows[0] == rows[1]) == (not fresh)
            assert fresh == rows[0].isdisjoint(rows[1])
        assert any(a.shape != b.shape or (a != b).any() for a, b in zip(*epochs))


def test_a_curriculum_begins_sizes_at_their_steps():
    only, mixed = task(starts=(0, 5)).train(), task(starts=(0, 5), keep_started=True).train()
    assert [only[s]["tokens"].shape[1] for s in range(9)] == [16] * 5 + [32] * 4
    later = [mixed[s]["tokens"].shape[1] for s in range(5, 17)]
    assert [mixed[s]["tokens"].shape[1] for s in range(5)] == [16] * 5
    assert sorted(later) == [16] * 4 + [32] * 8


def test_held_out_rows_are_counted_once_and_apart():
    data = task(slices=("size", "distance"), eval_batch_size=2, seed=7).eval_sets()["validation"]
    again = task(eval_batch_size=2).eval_sets()["validation"]
    same(data[3], again[3])
    batches = [data[s] for s in range(len(data))]
    assert sum((b["weights"].max(1) > 0).sum() for b in batches) == 40
    short = RecallTask(task(slices=("size", "distance")).config)
    for batch in (batches[0], batches[-1]):
        perfect = {"nll": jnp.zeros(batch["tokens"].shape), "hits": batch["weights"] > 0}
        found = short.metrics(perfect, batch)
        assert found["accuracy"][0] == found["accuracy"][1] == batch["weights"].sum()
        assert found["exact_match"][0] == found["exact_match"][1]
        mine = "accuracy_{}_{}".format(*short.config.evaluated[batch["size"][0]])
        assert found[mine][1] == batch["weights"].sum()
        by_distance = [count for key, (_, count) in found.items() if "from" in key]
        assert sum(by_distance) == batch["weights"].sum()
    none = {"nll": jnp.zeros(batches[0]["tokens"].shape), "hits": batches[0]["weights"] > 1}
    assert short.metrics(none, batches[0])["exact_match"][0] == 0


def test_one_length_and_all_targets():
    padded = task(one_length=True)
    for step in range(8):
        batch = padded.train()[step]
        assert batch["tokens"].shape == (4, 32)
        assert not batch["weights"][batch["segment_ids"] == 0].any()
    law = RecallTaskConfig(name="repeat", repeat=RepeatSpec(letters=8), train_sizes=((60, 9),), loss="all")
    batch = RecallTask(law).train()[0]
    counted, ids = batch["weights"] > 0, batch["segment_ids"]
    np.testing.assert_array_equal(counted[:, :-1], (ids[:, :-1] == ids[:, 1:]) & (ids[:, :-1] > 0))
    np.testing.assert_array_equal(
        batch["targets"][:, :-1][counted[:, :-1]], batch["tokens"][:, 1:][counted[:, :-1]]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "mqra"}, "task.name='mqra' is unknown; use one of mqar"),
        ({"train_sizes": ((16, 5),)}, r"task.train_sizes has \(16, 5\); task.mqar: 16 tokens"),
        ({"eval_sizes": ((16, 20),)}, r"task.eval_sizes has \(16, 20\); task.mqar: vocab_size=32"),
        ({"train_rows": (2,)}, "task.train_rows"),
        ({"starts": (0, 0)}, "task.starts"),
        ({"loss": "some"}, "task.loss='some'"),
        ({"eval_rows": 0}, "task.eval_rows=0"),
    ],
)
def test_a_field_that_cannot_work_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        task(**fields)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (mqar_config, ["smoke", "smoke_forgetting,s5", *(f"{name},mamba2" for name in SETS)]),
        (copying_config, [f"{name},M-*-" for name in copying_config.RECIPES]),
        (phonebook_config, ["smoke", "standard,cca", "reversed,s4d", "many,mamba"]),
        (induction_config, ["smoke", "full,attention"]),
    ],
)
def test_configs_are_valid_and_read_back(module, arguments):
    for argument in arguments:
        config = module.get_config(argument)
        config.validate()
        assert from_json(config.to_json()) == config
        assert config.model.vocab_size == config.task.law.vocab_size
        RecallTask(config.task)
    with pytest.raises(ValueError, match="expected WHAT,MODEL"):
        module.get_config("nothing")

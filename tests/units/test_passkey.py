"""Needles in text in training batches, in evaluation, and asked by probes of a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs.passkey_stdlib import get_config
from configs.saved import from_json
from eval.opened import OpenRun
from eval.probes import answers, asked, choose, passkey
from eval.probes.answers import Reading, read
from eval.probes.babi import Babi
from eval.probes.needles import Needles, string_match_all
from eval.probes.passkey import Passkey
from eval.probes.types import NotApplicable, Probe
from models.config import LMConfig
from objectives import model_of, objective_of
from runtime.mesh import MeshConfig, make_mesh
from tasks.haystack.config import HaystackConfig
from tasks.haystack.passkey import GENERATORS
from tasks.haystack.rows import HaystackRows, answer_metrics
from tasks.haystack.types import EVALUATION, Request, side_of
from tasks.lm import LMTask
from tasks.plant import PlantConfig
from tasks.tokenizer import ByteTokenizer
from tests.experiments import tiny, write_corpus

LENGTH = 480  # bytes: room for short prompts
BYTES = ByteTokenizer()


def silent(text):
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def config(corpus):
    """Half of the rows hold needles."""
    config = tiny(corpus)
    config.model = LMConfig(d_model=16, pattern="*")
    config.model.attention = dataclasses.replace(tiny(corpus).model.attention, window=None)
    config.task.seq_len, config.task.batch_size, config.task.eval_batch_size = LENGTH, 4, 4
    config.task.haystack = HaystackConfig(share=0.5, eval_samples=6)
    return config


def task_with(config, **haystack):
    task = dataclasses.replace(config.task, haystack=dataclasses.replace(config.task.haystack, **haystack))
    return LMTask(task)


@pytest.fixture(scope="module")
def task(config):
    return LMTask(config.task)


@pytest.fixture(scope="module")
def opened(config):
    """A run that has learned nothing."""
    model = model_of(config)
    params = jax.jit(model.init)(jax.random.key(0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return OpenRun(epath.Path("run"), config, 0, model, params, None, BYTES, mesh)


@pytest.fixture(scope="module")
def forward(opened):
    """``forward(tokens, segment_ids)``: logits of four rows in one pass without a state."""

    @jax.jit
    def logits(params, tokens, segment_ids):
        module = opened.model.bind(params)
        return module.logits(module(tokens, segment_ids=segment_ids)[0])

    return lambda *rows: np.asarray(logits(opened.params, *rows))


def test_rows_are_pure_in_step_and_row(task):
    data = task.train()
    whole, again = data[3], LMTask(task.config).train()[3]
    part = task.train(slice(1, 3))[3]
    for name, array in whole.items():
        np.testing.assert_array_equal(array, again[name])
        np.testing.assert_array_equal(array[1:3], part[name])
    assert not np.array_equal(whole["tokens"], data[4]["tokens"])


def test_the_share_of_rows_is_replaced_and_the_rest_is_the_text(task, config):
    text = task_with(config, share=0.0)
    counts = []
    for step in range(40):
        batch, plain = task.train()[step], text.train()[step]
        assert "marks" not in plain and {*batch} == {*plain, "marks"}
        needles = batch["marks"].any(axis=1)
        counts.append(needles.sum())
        for name, array in plain.items():
            np.testing.assert_array_equal(batch[name][~needles], array[~needles])
            assert batch[name].dtype == array.dtype
    np.testing.assert_allclose(np.mean(counts), 2, atol=0.4)


def test_a_row_holds_whole_samples_and_marks_their_answers(config):
    task = task_with(config, share=1.0, tasks=("stuffed_mamba", "qa1"), noise="sentences")
    single = 0
    for step in range(6):
        batch = task.train()[step]
        np.testing.assert_array_equal(batch["weights"] > 0, batch["segment_ids"] > 0)
        for tokens, targets, ids, marks, positions in zip(
            *(batch[n] for n in ("tokens", "targets", "segment_ids", "marks", "positions"))
        ):
            for segment in range(1, ids.max() + 1):
                here = ids == segment
                assert tokens[here][0] == targets[here][-1] == BYTES.separator_id
                np.testing.assert_array_equal(tokens[here][1:], targets[here][:-1])
                np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
                prompt, answer = BYTES.decode(tokens[here]), BYTES.decode(targets[here & (marks > 0)])
                assert prompt.endswith(answer) and answer[0] == " "
                assert side_of(answer.strip()) != EVALUATION or "Question" in prompt
                single += answer.strip().isdigit()
    assert single > 4


def test_lengths_grow_and_answers_alone_can_count(config):
    growing = task_with(config, share=1.0, growth_steps=100, loss="answer").haystack
    assert growing.longest(0) == growing.shortest < growing.longest(50) < growing.longest(100) == LENGTH
    first = growing.row(0, 0)
    assert growing.shortest - 90 < (first["segment_ids"] == 1).sum() <= growing.shortest  # a line less
    # The end after the answer counts too, and is not of the answer.
    ends = (first["weights"] > 0) & (first["marks"] == 0)
    assert (first["targets"][ends] == BYTES.separator_id).all()
    assert ends.sum() == first["segment_ids"].max() == first["marks"].sum() / len(" 12345")


def test_held_out_sets_have_their_length_and_keys_of_their_own(task, config):
    sets = task.eval_sets()
    assert list(sets) == ["validation", f"haystack_{LENGTH // 2}", f"haystack_{LENGTH}"]
    batches = list(sets[f"haystack_{LENGTH}"])
    assert [batch["marks"].any(axis=1).tolist() for batch in batches] == [
        [True] * 4,
        [True, True, False, False],
    ]
    for batch in batches:
        for targets, marks in zip(batch["targets"], batch["marks"]):
            if marks.any():
                assert side_of(BYTES.decode(targets[marks > 0]).strip()) == EVALUATION
    given = task_with(config, eval_lengths=(450, 480))
    assert list(given.eval_sets())[1:] == ["haystack_450", "haystack_480"]


def test_metrics_are_those_of_the_logits(config, opened, forward):
    objective = objective_of(config, opened.mesh)
    batch = objective.task.eval_sets()[f"haystack_{LENGTH}"][1]
    logits = forward(batch["tokens"], batch["segment_ids"])
    measure = jax.jit(lambda params, batch: objective.metrics(opened.model.bind(params), batch, None))
    found = jax.device_get(measure(opened.params, batch))
    asked, targets = batch["marks"] > 0, batch["targets"]
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    hits = logits.argmax(-1) == targets
    np.testing.assert_allclose(found["answer_bits"][0], nll[asked].sum() / np.log(2), rtol=1e-4)
    assert found["answer_accuracy"] == (hits[asked].sum(), asked.sum())
    assert found["exact_match"] == ((hits | ~asked).all(1)[:2].sum(), 2)
    assert found["loss"][1] == asked.sum() + 2 and "bits_per_byte" not in found
    # What counts as exact, where the model is always right and where it errs once.
    right = jnp.ones_like(hits)
    assert answer_metrics({"nll": jnp.asarray(nll), "hits": right}, batch)["exact_match"] == (2, 2)
    right = right.at[0, np.flatnonzero(asked[0])[2]].set(False)
    assert answer_metrics({"nll": jnp.asarray(nll), "hits": right}, batch)["exact_match"] == (1, 2)


def test_reading_is_the_forward_pass_and_greedy_decoding(opened, forward):
    rng = np.random.default_rng(0)
    samples = [GENERATORS["stuffed_mamba"](Request(rng, BYTES, n)) for n in (470, 230, 380, 300)]
    readings = read(opened, samples, silent, rows=2, new_tokens=6)

    def logits_after(prompts, following):
        """[6, V] where each of ``following`` is predicted, with what is before it given."""
        rows, real = np.zeros((4, LENGTH), np.int32), np.zeros((4, LENGTH), np.int32)
        for row, (prompt, ids) in enumerate(zip(prompts, following)):
            end = len(prompt) + len(ids)
            rows[row, :end], real[row, :end] = np.concatenate([prompt, ids]), 1
        return [logits[len(p) - 1 :][:6] for logits, p in zip(forward(rows, real), prompts)]

    prompts = [sample.prompt for sample in samples]
    for sample, reading, logits in zip(
        samples, readings, logits_after(prompts, [sample.answer for sample in samples])
    ):
        nats = -np.asarray(jax.nn.log_softmax(logits))[np.arange(6), sample.answer]
        np.testing.assert_array_equal(reading.predicted[:6], logits.argmax(-1))
        np.testing.assert_allclose(reading.nats, nats, rtol=1e-3, atol=1e-4)
    for reading, logits in zip(readings, logits_after(prompts, [reading.said for reading in readings])):
        np.testing.assert_array_equal(reading.said, logits.argmax(-1))


def says(answer, after):
    """A stand-in for `read`: to every sample ``answer(sample)``, then ``after``."""

    def reading(opened, samples, say, *, rows, new_tokens=0):
        found = []
        for sample in samples:
            ids = answer(sample)
            given = np.append(np.resize(ids, len(sample.answer)), BYTES.encode(after)[0])
            nats = np.full(len(sample.answer), 0.25)
            found.append(Reading(given, nats, np.concatenate([ids, BYTES.encode(after)])))
        return found

    return reading


PROBES = [
    Passkey(styles=tuple(GENERATORS), factors=(2.0, 4.0), depths=2, samples=2),
    Needles(factors=(2.0, 10.0), samples=2, noise="sentences"),
    Babi(factors=(4.0,), samples=2, noise="sentences"),
]


@pytest.fixture
def answer_with(monkeypatch):
    def set_(answer, after="."):
        for module in (passkey, asked):
            monkeypatch.setattr(module, "read", says(answer, after))

    return set_


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_an_oracle_scores_everything(probe, opened, answer_with):
    assert isinstance(probe, Probe)
    answer_with(lambda sample: sample.answer)
    result = probe.run(opened, silent)
    numbers = result.numbers
    if isinstance(probe, Passkey):
        assert numbers["prompts"] == 2 * 2 * 2 * 5
        for style, grid in numbers["grids"].items():
            assert np.array(grid["exact_match"]).tolist() == [[1.0, 1.0]] * 2
            assert set(numbers[f"{style}_per_digit"].values()) == {1.0}
            assert set(numbers[f"{style}_exact_within"].values()) == {1.0}
            assert numbers[f"{style}_recall_length"] == 4 * LENGTH
            assert 0.5 <= numbers[f"{style}_key_nats"]["2x"] <= 1.5
    else:
        assert all(value == 1 for of in numbers["score"].values() for value in of.values())
        assert all(value == 1 for of in numbers["tokens_right"].values() for value in of.values())
    if isinstance(probe, Needles):
        assert set(numbers["score"]) == set(probe.tasks) and numbers["effective_length"] == 10 * LENGTH
        assert "cwe 2x" in numbers["left_out"]
    assert len(probe.plot(result).axes) >= 1
    assert all(len(c.x) == len(c.y) > 0 for c in result.curves.values())


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: p.name)
def test_who_says_anything_scores_nothing(probe, opened, answer_with):
    answer_with(lambda sample: BYTES.encode("x" * len(sample.answer)))
    numbers = probe.run(opened, silent).numbers
    if isinstance(probe, Passkey):
        assert numbers["beacon_exact_match"] == {"2x": 0, "4x": 0} == numbers["landmark_per_digit"]
        assert numbers["stuffed_mamba_chance"]["exact_match"] == 1e-5
    else:
        assert all(value == 0 for of in numbers["score"].values() for value in of.values())


def test_a_number_that_goes_on_is_another_number(opened, answer_with):
    answer_with(lambda sample: sample.answer, after="7")
    numbers = PROBES[0].run(opened, silent).numbers
    for style, stops in (("landmark", True), ("beacon", True), ("longlora", False), ("stuffed_mamba", False)):
        assert set(numbers[f"{style}_exact_match"].values()) == {0.0 if stops else 1.0}


def test_where_there_is_nothing_to_ask(opened):
    mute = dataclasses.replace(opened, tokenizer=None)
    for probe in PROBES:
        with pytest.raises(NotApplicable, match="kind 'lm'.* has no tokenizer"):
            probe.run(mute, silent)
    with pytest.raises(NotApplicable, match="no prompt fits: .* shorter than its prompt .*; it needs"):
        Passkey(factors=(0.1,)).run(opened, silent)
    limited = dataclasses.replace(opened.config.model, max_positions=LENGTH)
    short = dataclasses.replace(opened, config=dataclasses.replace(opened.config, model=limited))
    lengths, left_out = answers.lengths_of(short, (1.0, 2.0))
    assert lengths == {"1x": LENGTH} and left_out == {
        "2x": f"{2 * LENGTH} tokens, model.max_positions={LENGTH}"
    }


def test_settings_that_cannot_work_are_named():
    for name, setting in (("passkey", "styles"), ("needles", "tasks"), ("babi", "tasks")):
        with pytest.raises(ValueError, match=f"{name}.{setting}=.*'no'.* should be some of"):
            choose(name, [f'{name}.{setting}=["no"]'])
        with pytest.raises(ValueError, match=f"{name}.noise='loud' should be one of own"):
            choose(name, [f"{name}.noise=loud"])
        with pytest.raises(ValueError, match=f"{name}.samples=0 should be at least 1"):
            choose(name, [f"{name}.samples=0"])
    assert string_match_all("It is ABC, or so", ("abc", "d")) == 0.5


def test_tasks_that_cannot_work_are_named(config):
    cases = [
        ({"tasks": ("landmarks",)}, r"task.haystack.tasks=\('landmarks',\) should name some of beacon"),
        ({"tasks": ("niah_multivalue",)}, "'niah_multivalue', which does not fit into task.seq_len=480"),
        ({"share": 1.5}, "task.haystack.share=1.5 should be"),
        ({"noise": "loud"}, "task.haystack.noise='loud' should be one of own, text, sentences"),
        ({"loss": "some"}, "task.haystack.loss='some'"),
        ({"eval_lengths": (100,)}, r"eval_lengths has 100, which should lie in \d+..480"),
    ]
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            task_with(config, **fields)
    text = LMTask(dataclasses.replace(config.task, haystack=HaystackConfig()))
    corpora = text.training, text.validation
    with pytest.raises(ValueError, match="token arrays without one"):
        HaystackRows(config.task.haystack, None, corpora, LENGTH, (4, LENGTH))
    with pytest.raises(ValueError, match="task.plant.distances and task.haystack.share are both set"):
        LMTask(dataclasses.replace(config.task, plant=PlantConfig((100,), 400)))
    for field, value in (("packing", "buckets"), ("carry_state", True)):
        task = dataclasses.replace(config.task, **{field: value})
        with pytest.raises(ValueError, match=f"task.{field}={value!r} does not go with|power of two"):
            LMTask(task)


def test_the_small_experiment(config):
    made = get_config("mamba2,16")
    made.validate()
    assert made.model.mamba2.d_state == 16 and made.task.haystack.share == 0.75
    assert from_json(made.to_json()).task == made.task
    older = json.loads(config.to_json())
    del older["task"]["haystack"]
    assert from_json(json.dumps(older)).task.haystack == HaystackConfig()
    for wrong in ("attention,16", "mamba2,many", "mamba2,0"):
        with pytest.raises(ValueError, match="is no number of states"):
            get_config(wrong)

"""Probes on a checkpoint: their numbers against direct computation, failures kept apart, watching a run."""

import dataclasses
import json
from typing import ClassVar

import jax
import numpy as np
import pytest

import train
from eval import run
from eval.opened import RunError, open_run
from eval.probes import PROBES, choose
from eval.probes.length_extrapolation import LengthExtrapolation
from eval.probes.loss_by_position import LossByPosition, contexts
from eval.probes.scoring import _padded, long_rows, paired_difference, rows_available, score, task_of
from eval.probes.sliding import sliding_scores, window_starts
from eval.probes.types import Curve, NotApplicable, Probe, ProbeResult
from models.loss import token_nll
from runtime.mesh import MeshConfig
from tasks.lm import LMTask
from tests.experiments import tiny, write_corpus

TEXT = ("bits_per_byte", "loss_by_position", "length_extrapolation", "condensing")
FEW = ["loss_by_position.min_documents=2", "length_extrapolation.min_rows=2"]


def experiment(corpus):
    config = tiny(corpus, steps=4)
    config.task.eval_fraction, config.task.eval_batches = 0.3, None
    config.model.pattern, config.checkpoint.every = "M*", 2
    return config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Workdir and final results of a run with checkpoints at steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train.run(experiment(corpus), workdir, jax.devices()[:1])


@pytest.fixture(scope="module")
def opened(trained):
    return open_run(trained[0])


@pytest.fixture(scope="module")
def records(opened, tmp_path_factory):
    """What the probes of held-out text leave, by name, and where."""
    out = tmp_path_factory.mktemp("out")
    run.examine(opened, choose(",".join(TEXT), FEW), out)
    return {path.stem: json.loads(path.read_text()) for path in (out / "4").glob("*.json")}, out / "4"


@pytest.fixture(scope="module")
def direct(opened):
    """``direct(batch)``: nats of every target in one pass without a state, of at most 9 x 75."""
    nll = jax.jit(lambda params, batch: token_nll(opened.model.bind(params), batch)[0])

    def call(batch):
        padded = {name: _padded(array, (9, 75)) for name, array in batch.items()}
        count, length = batch["tokens"].shape
        return np.asarray(nll(opened.params, padded), np.float64)[:count, :length]

    return call


def test_every_probe_leaves_a_record_and_a_picture(records):
    found, directory = dict(records[0]), records[1]
    assert set(found) == set(TEXT)
    assert "runs of kind 'beacon'" in found.pop("condensing")["not_applicable"]
    for name, record in found.items():
        assert (record["probe"], record["config"], record["step"]) == (name, "tiny", 4)
        assert record["numbers"] and "error" not in record and record["seconds"] > 0
        assert record["date"][:2] == "20" and record["device"]
        assert all(len(c["x"]) == len(c["y"]) > 0 and c["xlabel"] for c in record["curves"].values())
    assert {p.stem for p in directory.glob("*.png")} == set(TEXT) - {"bits_per_byte", "condensing"}
    assert min(p.stat().st_size for p in directory.glob("*.png")) > 10_000
    assert not list(directory.glob("*.tmp"))
    assert found["loss_by_position"]["settings"]["min_documents"] == 2


def test_bits_per_byte_are_those_of_training(records, trained):
    numbers = records[0]["bits_per_byte"]["numbers"]
    for metric in ("validation/bits_per_byte", "validation/loss"):
        assert numbers[metric] == trained[1][metric]


def test_loss_by_position_adds_up_to_the_validation_loss(records, trained, opened):
    numbers = records[0]["loss_by_position"]["numbers"]
    bins = numbers["bins"]["validation_rows"]
    assert sum(bins["tokens"]) == task_of(opened).validation.targets
    total = np.average(bins["loss"], weights=bins["tokens"])
    np.testing.assert_allclose(total, trained[1]["validation/loss"], rtol=1e-6)
    for metric in ("loss", "bits_per_byte"):
        np.testing.assert_allclose(
            numbers["validation_rows"][metric], trained[1][f"validation/{metric}"], rtol=1e-6
        )


def test_long_documents_have_the_same_number_of_targets_at_every_position(records):
    numbers = records[0]["loss_by_position"]["numbers"]
    bins = numbers["bins"]["long_documents"]
    widths = np.array(bins["to"]) - np.array(bins["from"]) + 1
    np.testing.assert_array_equal(np.array(bins["tokens"]), widths * numbers["documents"])
    assert (bins["from"][0], bins["to"][-1]) == (1, 256) and numbers["document_length"] == 8 * 32


def test_extrapolation_at_1x_equals_direct_computation(records, opened, direct):
    numbers = records[0]["length_extrapolation"]["numbers"]
    assert list(numbers["lengths"].values()) == [8, 16, 32, 64, 128, 256, 512]
    texts = long_rows(task_of(opened), 512, 64)
    assert len(texts["tokens"]) == numbers["rows"] > 2
    last, rows = numbers["targets_per_row"], {name: array[:, -32:] for name, array in texts.items()}
    nll = direct({**rows, "positions": np.broadcast_to(np.arange(32), rows["tokens"].shape)})
    np.testing.assert_allclose(numbers["loss"]["1x"], nll[:, -last:].mean(), rtol=1e-6)
    np.testing.assert_allclose(numbers["loss_whole_row"]["1x"], nll.mean(), rtol=1e-6)
    assert numbers["bits_per_byte_above_1x"]["1x"] == 0
    np.testing.assert_allclose(
        numbers["bits_per_byte_above_1x"]["4x"],
        numbers["bits_per_byte"]["4x"] - numbers["bits_per_byte"]["1x"],
        atol=1e-12,
    )


def test_scores_read_in_pieces_equal_one_pass(opened, direct):
    rows = long_rows(task_of(opened), 75, 9)  # pieces of 32, rows in groups of 8
    assert rows["tokens"].shape == (9, 75)
    nats, weights = score(opened, task_of(opened), rows, 75)["loss"]
    np.testing.assert_allclose(nats, direct(rows), rtol=1e-4, atol=1e-5)
    assert (weights == 1).all()
    _, bytes_ = score(opened, task_of(opened), rows, 75)["bits_per_byte"]
    np.testing.assert_array_equal(bytes_ == 0, rows["targets"] == 256)


def test_windows_of_a_row_score_every_target_once(opened, direct):
    assert window_starts(75, 32, 16) == [0, 16, 32, 43] and window_starts(64, 32, 32) == [0, 32]
    with pytest.raises(ValueError, match="stride 40 <= window 32"):
        window_starts(75, 32, 40)
    rows = long_rows(task_of(opened), 75, 2)
    nats, weights = sliding_scores(opened, task_of(opened), rows, 32, 16, 75)["loss"]
    assert nats.shape == (2, 75) and (weights == 1).all()
    for begin, first in ((0, 0), (16, 32), (32, 48), (43, 64)):
        window = {name: array[:, begin : begin + 32] for name, array in rows.items()}
        alone = direct({**window, "positions": rows["positions"][:, :32]})
        np.testing.assert_allclose(
            nats[:, first : begin + 32], alone[:, first - begin :], rtol=1e-4, atol=1e-5
        )


def test_a_truncated_context_is_the_control_of_both_protocols(records, direct, opened):
    numbers = records[0]["loss_by_position"]["numbers"]
    bins, beyond = numbers["bins"]["truncated_to_1x"], numbers["beyond_1x"]
    assert bins["from"][0] == 33 and bins["to"][-1] == 256
    assert set(bins["tokens"]) <= {numbers["documents"] * n for n in range(256)}
    np.testing.assert_allclose(
        beyond["truncated_to_1x"], np.average(bins["bits_per_byte"], weights=bins["tokens"]), rtol=2e-2
    )
    np.testing.assert_allclose(beyond["difference"], beyond["carried"] - beyond["truncated_to_1x"], atol=1e-9)
    numbers = records[0]["length_extrapolation"]["numbers"]
    assert "sliding window" in numbers["sliding_window_protocol"]
    assert list(numbers["bits_per_byte_sliding_window"]) == ["1x", "2x", "4x"]
    assert numbers["bits_per_byte_sliding_window_above_1x"]["1x"] == 0


def test_scores_on_a_mesh_of_all_devices(trained, opened):
    rows = long_rows(task_of(opened), 40, 5)
    alone = score(opened, task_of(opened), rows, 40)
    sharded = open_run(trained[0], mesh=MeshConfig(data=4, fsdp=2))
    with jax.set_mesh(sharded.mesh):
        scores = score(sharded, task_of(sharded), rows, 40)
    for metric, (sums, weights) in scores.items():
        np.testing.assert_allclose(sums, alone[metric][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(weights, alone[metric][1])


def test_long_rows_are_text_without_overlap_and_spread_over_documents(corpus):
    task = LMTask(experiment(corpus).task)
    lengths = task.validation.lengths
    assert rows_available(task, 100) == sum(lengths // 100)
    rows = long_rows(task, 100, 1000)
    assert len(rows["tokens"]) == rows_available(task, 100)
    np.testing.assert_array_equal(rows["tokens"][:, 1:], rows["targets"][:, :-1])
    assert not (rows["tokens"][:, 1:] == 256).any()
    longest = sum(lengths >= 100)
    starts = rows["tokens"][:, 0] == 256
    assert starts[:longest].all() and not starts[longest:].any()
    only = long_rows(task, 100, 1000, from_start=True)
    assert len(only["tokens"]) == longest == rows_available(task, 100, from_start=True)
    np.testing.assert_array_equal(long_rows(task, 100, 3)["tokens"], rows["tokens"][:3])


def test_long_rows_of_a_stream_run_over_documents(corpus):
    config = experiment(corpus).task
    config.packing = "stream"
    task = LMTask(config)
    longest = int(task.validation.lengths.max())
    rows = long_rows(task, 2 * longest, 100)
    assert (
        len(rows["tokens"]) == rows_available(task, 2 * longest) == task.validation.targets // (2 * longest)
    )
    assert (rows["segment_ids"] == 1).all() and (rows["weights"] == 1).all()
    np.testing.assert_array_equal(rows["positions"][0], np.arange(2 * longest))
    assert ((rows["tokens"] == 256).sum(axis=1) >= 1).all()


def test_contexts_count_from_segment_starts():
    ids = np.array([[1, 1, 1, 2, 2, 0, 0], [4, 5, 5, 5, 5, 5, 5]])
    expected = [[1, 2, 3, 1, 2, 1, 2], [1, 1, 2, 3, 4, 5, 6]]
    np.testing.assert_array_equal(contexts(ids), expected)


def test_bins_are_logarithmic_and_end_at_the_longest():
    assert LossByPosition(bins_per_doubling=1)._ends(32).tolist() == [1, 2, 4, 8, 16, 32]
    assert LossByPosition()._ends(30).tolist() == [1, 2, 4, 5, 8, 11, 16, 22, 30]
    assert LossByPosition()._ends(1).tolist() == [1]


def test_paired_difference_has_the_standard_error_of_the_mean():
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, 40))
    mean, error = paired_difference((other, np.ones(40)), (base, np.ones(40)))
    np.testing.assert_allclose(mean, (other - base).mean())
    np.testing.assert_allclose(error, (other - base).std(ddof=1) / np.sqrt(40))


def test_lengths_out_of_reach_are_told(opened):
    task = task_of(opened)
    lengths, left_out = LengthExtrapolation(factors=(0.01, 1, 4, 64), min_rows=2)._lengths(opened, task)
    assert lengths == {"1x": 32, "4x": 128}
    assert left_out["64x"] == "0 validation texts of 2048 targets, 2 needed"
    assert "0 tokens" in left_out["0.01x"]
    config = dataclasses.replace(
        opened.config, model=dataclasses.replace(opened.config.model, max_positions=64)
    )
    bounded = dataclasses.replace(opened, config=config)
    lengths, left_out = LengthExtrapolation(factors=(2, 4), min_rows=2)._lengths(bounded, task)
    assert list(lengths) == ["1x", "2x"] and "max_positions=64" in left_out["4x"]
    assert LossByPosition(min_documents=2)._length(bounded, task, 256) == 64
    with pytest.raises(NotApplicable, match="1x is left out: .* 1000 needed"):
        LengthExtrapolation(rows=1000, min_rows=1000)._lengths(opened, task)


@dataclasses.dataclass(frozen=True)
class Odd:
    """Fails, does not apply, or gives what JSON has no words for."""

    name: ClassVar[str] = "odd"
    way: str = "fine"

    def run(self, opened, say):
        if self.way == "fails":
            raise RuntimeError("no such luck")
        if self.way == "does not apply":
            raise NotApplicable("nothing to see")
        say("working")
        x = np.arange(1, 4)
        numbers = {"step": opened.step, "bad": float("nan"), "array": np.float32([1, np.inf])}
        return ProbeResult(numbers, {"line": Curve(x, x / 2, "x", "y")}, {"layer/x": x})

    def plot(self, result):
        return None


def test_a_failing_probe_is_recorded_and_the_others_run(opened, tmp_path, monkeypatch, capsys):
    assert isinstance(Odd(), Probe)
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "odd.png").write_text("of an earlier result")
    said = []
    probes = [Odd("fails"), *choose("bits_per_byte"), Odd("does not apply")]
    first, second, third = run.examine(opened, probes, tmp_path, said.append)
    assert first["error"] == "RuntimeError: no such luck" and "numbers" not in first
    assert "no such luck" in first["traceback"][-1]
    assert second["numbers"]["validation/loss"] > 0
    assert third["not_applicable"] == "nothing to see" and "error" not in third
    assert "odd: error: RuntimeError: no such luck" in said
    assert not (tmp_path / "4" / "odd.png").exists()
    assert json.loads((tmp_path / "4" / "odd.json").read_text()) == third

    (fine,) = run.examine(opened, [Odd()], tmp_path, said.append)
    assert fine["numbers"] == {"step": 4, "bad": "nan", "array": [1.0, "inf"]}
    assert fine["curves"]["line"]["y"] == [0.5, 1.0, 1.5] and "odd: working" in said
    assert json.loads((tmp_path / "4" / "odd.json").read_text()) == fine
    assert np.load(tmp_path / "4" / "odd.npz")["layer/x"].tolist() == [1, 2, 3]

    monkeypatch.setitem(PROBES, "odd", Odd)
    monkeypatch.setattr(run, "open_run", lambda workdir, step, config: opened)
    command = [f"--workdir={opened.workdir}", f"--out={tmp_path}", "--probes=odd"]
    with pytest.raises(SystemExit, match="1"):
        run.main([*command, "--set=odd.way=fails"])
    assert "no such luck" in capsys.readouterr().out
    run.main([*command, "--set=odd.way=does not apply"])
    assert "nothing to see" in capsys.readouterr().out


def interrupted(*args):
    raise KeyboardInterrupt


def test_watching_a_run(trained, opened, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "config.json").write_text((trained[0] / "config.json").read_text())
    waits, said = [], []

    def sleep(seconds):
        """The first checkpoint appears during the first wait, the last during the third."""
        waits.append(seconds)
        for step in {1: [2], 3: [4]}.get(len(waits), []):
            (workdir / "checkpoints" / str(step)).symlink_to(trained[0] / "checkpoints" / str(step))

    results = [r for (r,) in run.watch(workdir, [Odd()], say=said.append, poll=7, sleep=sleep)]
    assert [r["numbers"]["step"] for r in results] == [2, 4] and waits == [7, 7, 7]
    assert sorted(p.name for p in (workdir / "eval").iterdir()) == ["2", "4"]

    again_opened = lambda workdir, step: dataclasses.replace(opened, workdir=workdir, step=step)  # noqa: E731
    monkeypatch.setattr(run, "open_run", again_opened)
    again = lambda probe: [  # noqa: E731
        r["step"] for (r,) in run.watch(workdir, [probe], say=said.append, sleep=pytest.fail)
    ]
    assert again(Odd()) == [] and "step 4: already examined" in said
    assert again(Odd("fails")) == [2, 4]  # other settings
    assert again(Odd("fails")) == [2, 4]  # an error is tried again

    monkeypatch.setitem(PROBES, "odd", Odd)
    command = [f"--workdir={workdir}", "--probes=odd", "--watch"]
    run.main(command)
    assert capsys.readouterr().out.count("tiny, step ") == 2
    run.main(command)
    assert "step 2: already examined" in capsys.readouterr().err
    monkeypatch.setattr(run, "load_config", interrupted)
    run.main(command)  # ends in peace


def test_watching_passes_over_checkpoints_that_go_or_cannot_be_read(trained, tmp_path):
    workdir, said = tmp_path / "run", []
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "config.json").write_text((trained[0] / "config.json").read_text())
    for step, target in ((2, 2), (3, 2), (4, 4)):
        (workdir / "checkpoints" / str(step)).symlink_to(trained[0] / "checkpoints" / str(target))

    @dataclasses.dataclass(frozen=True)
    class Deleting(Odd):
        def run(self, opened, say):
            (workdir / "checkpoints" / "3").unlink(missing_ok=True)
            return super().run(opened, say)

    results = [r for (r,) in run.watch(workdir, [Deleting()], say=said.append, sleep=pytest.fail)]
    assert [r["step"] for r in results] == [2, 4]
    assert "step 3: passed over: it was deleted before its turn (checkpoint.keep_last)" in said


@pytest.mark.parametrize(
    "names, settings, message",
    [
        ("loss_by_postion", [], "no probe 'loss_by_postion'; did you mean 'loss_by_position'"),
        (",", [], "names no probe; there are bits_per_byte"),
        ("all", ["loss_by_position.documnts=3"], "no setting of loss_by_position 'documnts'; .*'documents'"),
        ("bits_per_byte", ["bits_per_byte.a=3"], "'a'; there is none"),
        ("all", ["loss_by_position.documents=many"], "documents=many should be of type int"),
        ("all", ["loss_by_position.documents=3"], "documents=3 should be at least min_documents"),
        ("all", ["length_extrapolation.factors=[-1]"], r"factors=\(-1,\) should be positive"),
        ("bits_per_byte", ["loss_by_position.documents=9"], "no probe 'loss_by_position'"),
        ("all", ["loss_by_position=9"], "expected PROBE.SETTING=VALUE"),
    ],
)
def test_what_cannot_be_asked_is_named(names, settings, message):
    with pytest.raises(ValueError, match=message):
        choose(names, settings)


def test_chosen_probes_have_their_settings():
    one, two = choose(
        "length_extrapolation,loss_by_position,length_extrapolation",
        ["length_extrapolation.factors=[1, 2]", "loss_by_position.factor=4"],
    )
    assert one == LengthExtrapolation(factors=(1, 2)) and two == LossByPosition(factor=4.0)
    assert [probe.name for probe in choose("all")] == list(PROBES)


def test_a_run_that_cannot_be_read_is_told_on_one_line(trained, tmp_path):
    (tmp_path / "config.json").write_text((trained[0] / "config.json").read_text())
    with pytest.raises(SystemExit, match="RunError: .*no checkpoint .*Train it first"):
        run.main([f"--workdir={tmp_path}"])
    with pytest.raises(SystemExit, match=r"RunError: .*of step 3"):
        run.main([f"--workdir={trained[0]}", "--step=3"])
    with pytest.raises(SystemExit, match="ValueError: there is no probe 'perplexity'"):
        run.main([f"--workdir={trained[0]}", "--probes=perplexity"])
    with pytest.raises(SystemExit):
        run.main([f"--workdir={trained[0]}", "--watch", "--step=2"])
    with pytest.raises(RunError, match="does not exist"):
        next(run.watch(tmp_path / "nowhere", [Odd()]))

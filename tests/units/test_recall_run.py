"""Recall runs: trained, resumed to the bit, on a mesh, probed beyond their sizes."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import train
from configs.base import ConfigError, Experiment
from configs.recall import RecallExperiment
from eval.opened import open_run
from eval.probes.recall import Recall, _scores, _task_of
from eval.probes.types import NotApplicable
from layers.attention import AttentionConfig
from models.config import LMConfig
from objectives import objective_of
from runtime.mesh import MeshConfig, make_mesh
from tasks.recall import RecallTask, RecallTaskConfig
from tasks.recall.mqar import MQARSpec
from tasks.tokenizer import ByteTokenizer


def experiment(mesh=None):
    config = RecallExperiment(
        name="tiny",
        model=LMConfig(
            vocab_size=16,
            d_model=16,
            pattern="*",
            attention=AttentionConfig(num_heads=2, num_kv_heads=2),
        ),
        task=RecallTaskConfig(
            mqar=MQARSpec(vocab_size=16), train_sizes=((16, 2), (16, 3)), eval_rows=12, batch_size=4
        ),
        mesh=mesh or MeshConfig(data=1),
    )
    config.train.steps, config.train.log_every, config.checkpoint.every = 4, 1, 2
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Workdir and results, on two devices."""
    workdir = tmp_path_factory.mktemp("recall") / "run"
    config = experiment(MeshConfig(data=2))
    return workdir, train.run(config, workdir, jax.devices()[:2])


def test_a_run_says_what_it_found(trained):
    workdir, results = trained
    assert results["step"] == 4 and results["reference/chance"] == 1 / 8
    each = [results[f"validation/accuracy_16_{n}"] for n in (2, 3)]
    np.testing.assert_allclose(results["validation/accuracy"], np.average(each, weights=[2, 3]), rtol=1e-5)
    assert 0 <= results["validation/exact_match"] <= 1 and results["validation/loss"] > 1
    assert (workdir / "report.html").exists() and (workdir / "loss.png").exists()


def test_resuming_gives_the_same_to_the_bit(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    again = train.run(experiment(MeshConfig(data=2)), tmp_path / "run", jax.devices()[:2])
    assert {k: v for k, v in again.items() if "/" in k and "memory" not in k} == {
        k: v for k, v in trained[1].items() if "/" in k and "memory" not in k
    }


def test_the_probe_finds_what_one_pass_finds(trained, tmp_path):
    """In pieces of 8 tokens and 4 rows, with the state carried; on one device."""
    opened = open_run(trained[0])
    probe = Recall(factors=(1.0, 2.0, 3.0), rows=6, batch=4, piece=8)
    result = probe.run(opened, lambda text: None)
    numbers = result.numbers
    assert numbers["training_size"] == "3 in 16" and "9 in 48" in numbers["left_out"]
    assert list(numbers["accuracy"]) == ["3 in 16", "6 in 32", "3 in 32", "3 in 48"]
    rows = RecallTask(opened.config.task).held_out((32, 3), np.arange(6))

    @jax.jit
    def logits(tokens):
        model = opened.model.bind(opened.params)
        return model.logits(model(tokens)[0])

    hits = np.asarray(logits(rows["tokens"])).argmax(-1) == rows["targets"]
    expected = _scores(rows, np.zeros(hits.shape), hits)
    assert numbers["accuracy"]["3 in 32"] == expected["accuracy"]
    assert sum(numbers["by_distance"]["3 in 32"]["answers"]) == 18
    assert {curve.xlabel for curve in result.curves.values()} == {
        "items to remember",
        "tokens of a row",
        "distance in tokens",
    }
    assert probe.plot(result) is not None
    bytes_lm = dataclasses.replace(opened, config=Experiment(), tokenizer=ByteTokenizer())
    law, size = _task_of(bytes_lm)
    assert law.config.name == "phonebook" and size == (243, 7)  # of 256
    with pytest.raises(NotApplicable, match="kind 'recall'"):  # token arrays without a tokenizer
        probe.run(dataclasses.replace(opened, config=Experiment()), print)


def test_a_perfect_and_a_blind_reader_are_scored():
    rows = RecallTask(experiment().task).held_out((16, 3), np.arange(8))
    asked = rows["distance"] > 0
    perfect, blind = (_scores(rows, np.ones(asked.shape), hits) for hits in (asked, ~asked))
    assert perfect["accuracy"] == perfect["exact_match"] == 1 and perfect["loss"] == 1
    assert blind["accuracy"] == blind["exact_match"] == 0
    assert perfect["accuracy_standard_error"] == 0


def test_what_cannot_work_is_named():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    config = experiment()
    config.model.vocab_size = 8
    with pytest.raises(ValueError, match="model.vocab_size=8, but task.mqar has ids up to 15"):
        objective_of(config, mesh)
    config = experiment()
    config.model.max_positions = 8
    with pytest.raises(ValueError, match=r"task.train_sizes\[0\] has rows of 16 tokens"):
        objective_of(config, mesh)
    config = experiment()
    config.task.train_sizes = ((16, 9),)
    with pytest.raises(ConfigError, match="task.train_sizes has"):
        train.setup(config, jax.devices()[:1])
    config = experiment()
    config.stop_accuracy = 2.0
    with pytest.raises(ValueError, match="stop_accuracy=2.0"):
        config.validate()
    with pytest.raises(ValueError, match="recall.rows=0"):
        Recall(rows=0)


def test_a_run_ends_at_the_accuracy_asked_for():
    config = experiment()
    config.stop_accuracy = 0.9
    objective = objective_of(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert objective.verdict([{"step": 2, "validation/accuracy": 0.5}]) == ("", "")
    assert "stop_accuracy=0.9" in objective.verdict([{"step": 2, "validation/accuracy": 0.95}])[1]

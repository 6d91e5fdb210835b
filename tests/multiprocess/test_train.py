"""The training program as 2 and 4 processes: the losses of one, a kill, a notice, ever fewer processes."""

import signal

import jax
import numpy as np
import pytest

import train
from runtime.mesh import MeshConfig
from tests.experiments import tiny, write_corpus
from tests.several import losses, succeeded, train_processes

NO_EXTRAS = ("--config.train.baselines=False", "--config.train.sample_length=0")


def experiment(corpus, pattern, steps, mesh):
    """As the flags of the processes say it."""
    made = tiny(corpus, steps=steps, mesh=mesh)
    made.model.pattern = pattern
    made.train.baselines, made.train.sample_length = False, 0
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.mark.slow
def test_two_processes_train_as_one(corpus, tmp_path):
    """Data and sequence across processes, two devices each."""
    mesh = MeshConfig(2, 1, 1, 2)
    flags = [f"--config.mesh.{axis}={getattr(mesh, axis)}" for axis in ("data", "fsdp", "tensor", "sequence")]
    flags += ["--config.model.pattern=M", "--config.train.steps=4", *NO_EXTRAS]
    config = f"tests/tiny_config.py:{corpus}"
    told = train_processes(2, config, tmp_path / "two", *flags, devices=2)
    assert succeeded(told)
    assert "2 processes" in told[0][1] and "step" not in told[1][1], "only process 0 reports"
    pieces = "40 pieces of batches as they should be"  # 5 arrays, 4 steps, 2 devices
    assert all(pieces in output for _, output in told), told

    train.run(experiment(corpus, "M", 4, mesh), tmp_path / "one", jax.devices()[:4])
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert sorted(two) == sorted(one) == list(range(1, 5))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)


@pytest.mark.slow
def test_four_processes_lose_one_then_two_are_stopped_then_one_ends(corpus, tmp_path):
    steps, config = 40, f"tests/tiny_config.py:{corpus}"
    flags = ("--config.model.pattern=*-", f"--config.train.steps={steps}", "--config.checkpoint.every=3")
    flags += ("--config.mesh.data=1", "--config.mesh.fsdp=-1", *NO_EXTRAS)
    run = tmp_path / "run"
    told = train_processes(4, config, run, *flags, signal_at="2:7:SIGKILL")
    assert told[2][0] == -signal.SIGKILL
    for i in (0, 1, 3):
        status, output = told[i]
        assert status != 0 and "of 4 died" in output, output
        assert "*** Check failure" not in output
    assert "LostProcess: process 2 of 4 died" in told[0][1], told[0][1]
    four = losses(run)

    told = train_processes(2, config, run, *flags, signal_at="1:8:SIGTERM")
    assert succeeded(told)
    assert f"resuming {run} from step" in told[0][1] and "preemption notice: saved step" in told[0][1]
    stopped = max(losses(run))

    made = experiment(corpus, "*-", steps, MeshConfig(1))
    made.checkpoint.every = 3
    results = train.run(made, run, jax.devices()[:1])
    assert results["step"] == steps and stopped < steps

    train.run(made, tmp_path / "whole", jax.devices()[:1])
    whole, broken = losses(tmp_path / "whole"), losses(run)
    assert sorted(broken) == sorted(whole) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(broken.values()), list(whole.values()), rtol=1e-5)
    np.testing.assert_allclose(list(four.values()), [whole[step] for step in four], rtol=1e-5)

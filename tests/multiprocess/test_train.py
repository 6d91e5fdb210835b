"""The training program as two processes of two devices: the losses of one process, and one resumes two."""

import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import train
from eval.curves import read_records
from runtime.mesh import MeshConfig
from tests.experiments import tiny, write_corpus

ROOT = pathlib.Path(__file__).resolve().parents[2]


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in read_records(workdir / "metrics.jsonl") if "train/loss" in r}


def run_two(corpus, workdir, *flags):
    """``python train.py`` twice, as the processes of one run; the output of process 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "train.py", f"--config=tests/tiny_config.py:{corpus}", f"--workdir={workdir}"]
    command += [f"--config.distributed.coordinator=127.0.0.1:{port}", "--config.distributed.num_processes=2"]
    workers = [
        subprocess.Popen(
            [*command, f"--config.distributed.process_id={i}", *flags],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs):
        assert worker.returncode == 0, output[-4000:]
    return outputs


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    corpus, mesh = write_corpus(tmp_path / "corpus"), MeshConfig(2, 1, 1, 2)
    flags = [f"--config.mesh.{axis}={getattr(mesh, axis)}" for axis in ("data", "fsdp", "tensor", "sequence")]
    outputs = run_two(corpus, tmp_path / "two", *flags)
    assert "2 processes" in outputs[0] and "step" not in outputs[1], "only process 0 reports"

    train.run(tiny(corpus, mesh=mesh), tmp_path / "one", jax.devices()[:4])
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert sorted(two) == sorted(one) == list(range(1, 9))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)

    # What two processes saved at step 4, one process on one device carries on.
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "8")
    train.run(tiny(corpus), tmp_path / "resumed", jax.devices()[:1])
    np.testing.assert_allclose(list(losses(tmp_path / "resumed").values()), list(one.values()), rtol=1e-5)

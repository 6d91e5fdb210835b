"""Two processes of two devices each: feeding on every mesh, checkpoints, and agreeing on when to stop."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from runtime.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(__file__).with_name("runtime_worker.py")


def run_workers(*arguments: str) -> list[str]:
    """Output of each of two worker processes; fails if one does."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(i), f"127.0.0.1:{port}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for i in range(2)
    ]
    try:
        results = [worker.communicate(timeout=180) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (out, err) in zip(workers, results):
        assert worker.returncode == 0, f"{out[-2000:]}\n{err[-4000:]}"
    return [out for out, _ in results]


@pytest.mark.slow
def test_two_processes(tmp_path):
    outputs = run_workers(str(tmp_path))
    stops = []
    for out in outputs:
        assert "fed 16 meshes" in out
        assert "corrupt: restored 1" in out
        assert "one process failed: restored 1" in out
        stops.append([line for line in out.splitlines() if line.startswith("stopped")])
    assert stops[0] == stops[1] and len(stops[0]) == 1, "the processes stop after the same step"

    # What two processes saved, one process restores onto eight devices.
    mesh = jax.make_mesh((8,), ("fsdp",))
    row = NamedSharding(mesh, PartitionSpec("fsdp"))
    with Checkpoints(tmp_path) as checkpoints:
        wanted = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=row)}
        found, step = checkpoints.restore(wanted)
    assert f"stopped at {step}" in stops[0][0]
    np.testing.assert_array_equal(found["w"], np.arange(64.0).reshape(8, 8))

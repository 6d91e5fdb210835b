"""The training program as several processes on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

from eval.curves import read_records

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKER = "tests/multiprocess/train_worker.py"
HEARTBEAT = 10  # seconds


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """Training loss by step, as written."""
    return {r["step"]: r["train/loss"] for r in read_records(workdir / "metrics.jsonl") if "train/loss" in r}


def environment(devices: int = 1, signal_at: str = "") -> dict[str, str]:
    """Of a process with ``devices`` CPU devices; it compiles as the tests do, and starts once only.

    On a busy machine XLA may not take one device that waits long for another of its process for a deadlock.
    """
    xla = ("force_host_platform_device_count", devices), ("backend_optimization_level", 0)
    xla += (("cpu_collective_call_terminate_timeout_seconds", 600),)
    added = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join(f"--xla_{name}={value}" for name, value in xla),
        "GLIBC_TUNABLES": "",
    }
    return {**os.environ, **added, **({"SIGNAL_AT": signal_at} if signal_at else {})}


def train_processes(
    count: int, config: str, workdir: pathlib.Path, *flags: str, devices: int = 1, signal_at: str = ""
) -> list[tuple[int, str]]:
    """Runs the program as ``count`` processes of ``devices`` devices each; status and output of every one.

    Args:
        signal_at: see tests/multiprocess/train_worker.py.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, WORKER, f"--config={config}", f"--workdir={workdir}", *flags]
    if count > 1:
        command += [
            f"--config.distributed.coordinator=127.0.0.1:{port}",
            f"--config.distributed.num_processes={count}",
            f"--config.distributed.heartbeat_timeout={HEARTBEAT}",
        ]
    processes = [
        subprocess.Popen(
            [*command, *([f"--config.distributed.process_id={i}"] if count > 1 else [])],
            cwd=ROOT,
            env=environment(devices, signal_at),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs)]


def succeeded(told: list[tuple[int, str]]) -> bool:
    """Whether every process ended with status 0; shows what the others said last."""
    failed = [(i, status, output) for i, (status, output) in enumerate(told) if status]
    for i, status, output in failed:
        print(f"--- process {i} ended with status {status}:\n{output[-4000:]}")
    return not failed

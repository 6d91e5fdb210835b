"""A task as a function that an executor pickles and calls elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

from tools.launch.task import GRACE, Task, spawn, wait_for

POLL = 0.2  # seconds between looks


class Work:
    """Runs a task in ``cwd`` and returns its exit code; interrupted, it has the job save and leave first.

    A job of the same name that another launcher left running is waited for.
    """

    def __init__(self, task: Task, cwd: str):
        self.task, self.cwd = task, cwd
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        wait_for([self.task.lock], float("inf"))
        # SLURM sends the signal before the end of the time to every process: it is for submitit alone.
        before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        try:
            self._process = spawn(self.task, os.environ, self.cwd)
        finally:
            signal.signal(signal.SIGUSR2, before)
        try:
            while self._process.poll() is None:
                time.sleep(POLL)
        finally:
            self._leave()
        return self._process.returncode

    def checkpoint(self) -> Any:
        """For submitit, before the time is over or the job makes way: saves, and gives what to go on with."""
        import submitit

        self._leave()
        return submitit.helpers.DelayedSubmission(Work(self.task, self.cwd))

    def _leave(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        deadline = time.monotonic() + GRACE
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)

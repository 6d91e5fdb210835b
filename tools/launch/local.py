"""Where jobs run. Another place (a queue of a cluster) is another class like `LocalProcesses`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol, runtime_checkable

from configs.base import ConfigError

GRACE = 120.0  # seconds that jobs have to save and leave


@runtime_checkable
class Launcher(Protocol):
    """Starts jobs and tells how they ended. A job is a name, and the arguments of a python.

    Attributes:
        slots: how many run at once.
    """

    slots: int

    def start(self, name: str, argv: tuple[str, ...], log: Path) -> None:
        """Returns at once; what the job says is appended to ``log``."""

    def ended(self) -> dict[str, int]:
        """Exit codes of the jobs that have ended since it was last asked."""

    def stop(self) -> None:
        """Has all jobs save and leave, and waits for them."""


class LocalProcesses:
    """Processes of this machine, in the directory that the sweep was started in.

    Each leads a process group of its own: Ctrl-C reaches only the sweep, which then stops its jobs itself.
    They all hold ``lock``, so that jobs which outlive a sweep that was killed are not started a second time.

    Raises:
        ConfigError: another sweep, or a job of one, holds it.
    """

    def __init__(self, slots: int, lock: Path):
        self.slots = slots
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        lock.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ConfigError(
                f"{lock} is held: another sweep works there, or a job of one that was killed still "
                "runs; wait for it, or stop it"
            ) from None

    def start(self, name: str, argv: tuple[str, ...], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._running[name] = subprocess.Popen(
                [sys.executable, *argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self._lock.fileno(),),
            )

    def ended(self) -> dict[str, int]:
        codes = {name: process.poll() for name, process in self._running.items()}
        over = {name: code for name, code in codes.items() if code is not None}
        for name in over:
            del self._running[name]
        return over

    def stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        deadline = time.monotonic() + GRACE
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._running.clear()

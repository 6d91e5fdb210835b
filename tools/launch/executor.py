"""Where jobs run: what an executor is, and which job of a launcher that was killed still goes on."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import os
import signal
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from configs.base import ConfigError

GRACE = 120.0  # seconds that jobs have to save and leave
MANY = 1000  # jobs at once where a queue orders them: as long as a SLURM array may be by default


@dataclasses.dataclass(frozen=True)
class Task:
    """A job for an executor: arguments of a python.

    Attributes:
        log: what the job says is appended to it; its lock lies beside it.
    """

    name: str
    argv: tuple[str, ...]
    log: Path

    @property
    def lock(self) -> Path:
        """Held by the job's process for as long as it lives, whatever becomes of the launcher."""
        return self.log.with_suffix(".lock")


@runtime_checkable
class Executor(Protocol):
    """Starts jobs and tells how they ended.

    Attributes:
        slots: how many it takes at once.
    """

    slots: int

    def start(self, tasks: Sequence[Task]) -> list[str]:
        """Returns at once, with the names of those that a launcher which was killed had started and that
        still run: they are waited for, not started again."""

    def ended(self) -> dict[str, int | None]:
        """Exit codes of the jobs that have ended since it was last asked, None where that is not known."""

    def stop(self) -> None:
        """Has all jobs save and leave, and waits for them."""


class Left:
    """Jobs that a launcher which was killed had started on this machine, known by their locks."""

    def __init__(self) -> None:
        self._locks: dict[str, Path] = {}

    def take(self, task: Task) -> bool:
        """Whether the job still runs; then it is one of these."""
        if held(task.lock):
            self._locks[task.name] = task.lock
        return task.name in self._locks

    def ended(self) -> dict[str, int | None]:
        over = [name for name, lock in self._locks.items() if not held(lock)]
        for name in over:
            del self._locks[name]
        return dict.fromkeys(over)

    def stop(self) -> None:
        """Asks them to leave and waits until they have, or have had their time."""
        for lock in self._locks.values():
            signal_holder(lock, signal.SIGTERM)
        wait_for(self._locks.values())
        self._locks.clear()


def hold(path: Path) -> IO[str] | None:
    """The open file that holds the lock ``path`` until it and its copies in other processes are closed.

    None if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def held(path: Path) -> bool:
    """Whether a process holds the lock."""
    if not path.exists():
        return False
    file = hold(path)
    if file is None:
        return True
    file.close()
    return False


def note_holder(file: IO[str], pid: int) -> None:
    """Writes into a lock which process of this machine holds it."""
    file.truncate(0)
    file.write(f"{socket.gethostname()} {pid}\n")
    file.flush()


def signal_holder(path: Path, number: signal.Signals) -> None:
    """Sends a signal to the process that holds a lock, if it is one of this machine."""
    host, _, pid = path.read_text().strip().partition(" ")
    if held(path) and host == socket.gethostname() and pid.isdecimal():
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:  # it has just left
            return


def wait_for(locks: Collection[Path], seconds: float = GRACE) -> None:
    """Until no process holds any of the locks, or the time is over."""
    deadline = time.monotonic() + seconds
    while any(held(lock) for lock in locks) and time.monotonic() < deadline:
        time.sleep(0.1)


def needed(package: str, extra: str) -> Any:
    """The package, imported. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(f"{package} is not installed: pip install -e '.[{extra}]'") from None

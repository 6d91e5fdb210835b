"""Where jobs run: what an executor is, and which job of a launcher that was killed still goes on."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from configs.base import ConfigError
from tools.launch.task import Task, held, signal_holder, wait_for

MANY = 1000  # jobs at once where a queue orders them: as long as a SLURM array may be by default


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


def needed(package: str, extra: str) -> Any:
    """The package, imported. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(f"{package} is not installed: pip install -e '.[{extra}]'") from None

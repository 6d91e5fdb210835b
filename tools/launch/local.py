"""Jobs as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from configs.base import ConfigError
from tools.launch.executor import Left
from tools.launch.task import GRACE, Task, spawn


class LocalProcesses:
    """Processes of this machine, ``slots`` at once, in the directory that the launcher was started in.

    Each leads a process group of its own: Ctrl-C reaches only the launcher, which then stops its jobs itself.

    Args:
        settings: "devices", such as "0,1": each job sees one of them alone (CUDA_VISIBLE_DEVICES).

    Raises:
        ConfigError: a setting that there is not, or fewer devices than jobs.
    """

    def __init__(self, slots: int, settings: Mapping[str, Any] | None = None):
        given = dict(settings or {})
        self.slots = slots
        self._free = [device for device in str(given.pop("devices", "")).split(",") if device]
        if given:
            raise ConfigError(f"--set {', '.join(given)}: --executor=local knows devices=0,1,... alone")
        if 0 < len(self._free) < slots:
            raise ConfigError(f"--jobs={slots} needs as many devices; --set devices has {len(self._free)}")
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._devices: dict[str, str] = {}
        self._left = Left()

    def start(self, tasks: Sequence[Task]) -> list[str]:
        found = []
        for task in tasks:
            if self._left.take(task):
                found.append(task.name)
            else:
                self._start(task)
        return found

    def ended(self) -> dict[str, int | None]:
        over: dict[str, int | None] = {}
        for name, process in self._running.items():
            code = process.poll()
            if code is not None:
                over[name] = code
        for name in over:
            del self._running[name]
            if name in self._devices:
                self._free.append(self._devices.pop(name))
        return over | self._left.ended()

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
        self._left.stop()

    def _start(self, task: Task) -> None:
        environment = dict(os.environ)
        if self._free:
            self._devices[task.name] = environment["CUDA_VISIBLE_DEVICES"] = self._free.pop(0)
        self._running[task.name] = spawn(task, environment)

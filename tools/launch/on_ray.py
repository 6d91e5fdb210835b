"""Jobs as Ray tasks: of a cluster that runs, or of one on this machine for as long as the launcher lives."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from configs.base import ConfigError
from tools.launch.executor import Left, needed
from tools.launch.task import GRACE, Task, wait_for
from tools.launch.worker import Work


class RayTasks:
    """Ray runs as many at once as its CPUs and GPUs allow, and never more than ``slots``.

    Args:
        settings: "address" of a cluster ("auto" for the one of this machine), "cpus" (1) and "gpus" (0) of a
            job. The nodes share the file system that the sweep lies in.

    Raises:
        ConfigError: Ray, its cluster or a setting is not there.
    """

    def __init__(self, slots: int, settings: Mapping[str, Any]):
        self._ray = needed("ray", "ray")
        self.slots = slots
        given = dict(settings)
        address, cpus, gpus = given.pop("address", None), given.pop("cpus", 1), given.pop("gpus", 0)
        if given:
            raise ConfigError(f"--set {', '.join(given)}: --executor=ray knows address, cpus and gpus")
        try:
            self._ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except Exception as error:  # a node that does not start in time is no narrower one
            raise ConfigError(f"--executor=ray, address={address}: {error}") from error
        self._run = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_run)
        self._tasks: dict[Any, Task] = {}
        self._left = Left()

    def start(self, tasks: Sequence[Task]) -> list[str]:
        found = [task.name for task in tasks if self._left.take(task)]
        for task in tasks:
            if task.name not in found:
                self._tasks[self._run.remote(Work(task, os.getcwd()))] = task
        return found

    def ended(self) -> dict[str, int | None]:
        over = self._left.ended()
        done, _ = (
            self._ray.wait([*self._tasks], num_returns=len(self._tasks), timeout=0)
            if self._tasks
            else ([], [])
        )
        for reference in done:
            over[self._tasks[reference].name] = self._code(reference)
            del self._tasks[reference]
        return over

    def stop(self) -> None:
        for reference in self._tasks:
            self._ray.cancel(reference)
        if self._tasks:
            self._ray.wait([*self._tasks], num_returns=len(self._tasks), timeout=GRACE)
            wait_for([task.lock for task in self._tasks.values()])
        self._tasks.clear()
        self._left.stop()
        self._ray.shutdown()

    def _code(self, reference: Any) -> int | None:
        """None where Ray's worker has failed; why goes to the log of the task."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            log = self._tasks[reference].log
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(f"{str(error).strip()}\n")
            return None


def _run(work: Work) -> int:
    return work()

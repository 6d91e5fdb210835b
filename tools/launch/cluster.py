"""Jobs through submitit: arrays of a SLURM cluster, or processes of this machine on the same path."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from configs.base import ConfigError
from runtime.run_record import replace_text
from tools.launch.executor import Left, needed
from tools.launch.task import Task, wait_for
from tools.launch.worker import Work

DAY = 24 * 60
# What is short here, and what submitit's AutoExecutor calls it. Other settings are sbatch's own.
SHORT = {"time": "timeout_min", "cpus": "cpus_per_task", "gpus": "gpus_per_node", "mem": "mem_gb"}
GENERIC = ("nodes", "tasks_per_node", "name", *SHORT.values())


class SubmittedJobs:
    """Jobs that are handed to submitit, all that can run as one array.

    A launcher that was killed leaves its jobs in the queue; the next one finds their ids in
    ``root/submitit/jobs.json`` and waits for them.

    Args:
        slots: jobs that are handed over at once.
        parallel: jobs of one array that run at once.
        settings: "cluster" ("slurm", or "local" for processes of this machine), "time" in minutes (a day),
            "cpus", "gpus" and "mem" (in GB) of a job, and whatever sbatch knows, such as partition, account,
            qos, constraint.

    Raises:
        ConfigError: submitit, SLURM or a setting is not there.
    """

    def __init__(self, slots: int, parallel: int, root: Path, settings: Mapping[str, Any]):
        self._submitit = needed("submitit", "slurm")
        self.slots = slots
        self._folder, self._ids = root / "submitit", epath.Path(root / "submitit" / "jobs.json")
        given = {"time": DAY, "slurm_array_parallelism": parallel} | dict(settings)
        self._cluster = given.pop("cluster", "slurm")
        try:
            self._executor = self._submitit.AutoExecutor(self._folder, cluster=self._cluster)
            self._executor.update_parameters(**{_parameter(key): value for key, value in given.items()})
        except (RuntimeError, NameError, AssertionError, ValueError) as error:
            raise ConfigError(f"--executor=slurm, cluster={self._cluster!r}: {error}") from error
        self._jobs: dict[str, tuple[Task, Any]] = {}
        self._left = Left()

    def start(self, tasks: Sequence[Task]) -> list[str]:
        found = [task.name for task in tasks if self._take(task)]
        new = [task for task in tasks if task.name not in found]
        if new:
            for task in new:  # where a worker that cannot start is told of
                task.log.parent.mkdir(parents=True, exist_ok=True)
            jobs = self._executor.submit_array([Work(task, os.getcwd()) for task in new])
            self._jobs |= {task.name: (task, job) for task, job in zip(new, jobs)}
            self._keep()
        return found

    def ended(self) -> dict[str, int | None]:
        over = {name: _code(task, job) for name, (task, job) in self._jobs.items() if job.done()}
        for name in over:
            del self._jobs[name]
        if over:
            self._keep()
        return over | self._left.ended()

    def stop(self) -> None:
        for _, job in self._jobs.values():
            job.cancel(check=False)
        wait_for([task.lock for task, _ in self._jobs.values()])
        self._jobs.clear()
        self._keep()
        self._left.stop()

    def _take(self, task: Task) -> bool:
        """Whether a job of another launcher is in the queue or runs; then it is waited for."""
        known = json.loads(self._ids.read_text()) if self._ids.exists() else {}
        if self._cluster != "slurm" or task.name not in known:
            return self._left.take(task)
        job = self._submitit.SlurmJob(self._folder, known[task.name])
        if job.done(force_check=True):
            return False
        self._jobs[task.name] = task, job
        return True

    def _keep(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        replace_text(
            self._ids, json.dumps({name: job.job_id for name, (_, job) in self._jobs.items()}) + "\n"
        )


def _parameter(key: str) -> str:
    name = SHORT.get(key, key)
    return name if name in GENERIC or name.startswith("slurm_") else f"slurm_{name}"


def _code(task: Task, job: Any) -> int | None:
    """None where the worker itself has failed; why goes to the log of the task."""
    if job.paths.result_pickle.exists():
        error = job.exception()
        if error is None:
            return job.result()
    else:
        error = f"{job.job_id} ended as {job.state}; see {job.paths.stderr}"
    with task.log.open("a") as log:
        log.write(f"{str(error).strip()}\n")
    return None

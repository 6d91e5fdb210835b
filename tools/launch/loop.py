"""The one loop of a sweep: start what can run, note what has ended, until nothing more can."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from etils import epath

from configs.study import Study
from runtime.run_record import replace_text
from runtime.writers import to_json
from tools.launch import plan, status
from tools.launch.executor import Executor
from tools.launch.plan import Job, Outcome
from tools.launch.show import Show
from tools.launch.task import Task

POLL = 1.0  # seconds between looks

Grow = Callable[[Mapping[str, Outcome]], Study]
"""The study as it is, given how jobs have ended so far: a search adds an arm where one has ended."""


def sweep(
    grow: Grow,
    root: Path,
    executor: Executor,
    show: Show,
    *,
    retries: int = 0,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Outcome]:
    """Runs the study in ``root`` as far as it can be, and says how every job ended, by name.

    What is there already is not run again; a job that failed in an earlier sweep is tried once more, a
    training from its last checkpoint. ``root/sweep.json`` tells the same to who looks in meanwhile.

    Args:
        retries: how often a job that failed is tried again in this sweep.

    Raises:
        ConfigError: a config cannot be made.
        KeyboardInterrupt: after the running jobs have saved and left.
    """
    loop = _Loop(grow, root, executor, show, retries)
    news = True
    try:
        while True:
            if news:
                news = loop.start()
            if not loop.running and not news:
                return loop.outcomes
            news = loop.end() or news
            loop.write()
            show.update(loop.outcomes, [job for job, _ in loop.running.values()])
            if not news:
                sleep(POLL)
    finally:
        if loop.running:
            show.say(f"stopping {len(loop.running)} of the study's jobs; they save and leave")
            executor.stop()


@dataclasses.dataclass
class _Loop:
    """What the sweep knows.

    Attributes:
        running: jobs, and when they were started.
        failed: how often, by the names of jobs.
    """

    grow: Grow
    root: Path
    executor: Executor
    show: Show
    retries: int
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    running: dict[str, tuple[Job, float]] = dataclasses.field(default_factory=dict)
    failed: dict[str, int] = dataclasses.field(default_factory=dict)

    def start(self) -> bool:
        """Fills the free slots. Whether jobs were found that had ended before: others may wait for them."""
        news, tasks = False, list[Task]()
        for job in list(plan.jobs(self.grow(self.outcomes), self.root, self.outcomes)):
            if job.name in self.outcomes or job.name in self.running:
                continue
            there = status.found(job)
            if there is not None:
                self.outcomes[job.name], news = there, True
                self.show.ended(job, there, before=True)
            elif len(self.running) < self.executor.slots:
                self.show.say(plan.command(job))
                tasks.append(Task(job.name, job.argv, self._log(job.name)))
                self.running[job.name] = job, time.monotonic()
        for name in self.executor.start(tasks) if tasks else []:
            self.show.say(f"{name}: still runs, since an earlier start of this sweep; waiting for it")
        return news

    def end(self) -> bool:
        """Notes what has ended. Whether anything has."""
        ended = self.executor.ended()
        for name, code in ended.items():
            job, begin = self.running.pop(name)
            outcome = status.ended(job, code, self._log(name), time.monotonic() - begin)
            if outcome.again:
                self.failed[name] = self.failed.get(name, 0) + 1
                outcome = dataclasses.replace(outcome, failures=self.failed[name])
                if self.failed[name] <= self.retries:
                    self.show.say(f"{name}: {outcome.why}; once more ({self.failed[name]} of {self.retries})")
                    continue
            self.outcomes[name] = outcome
            self.show.ended(job, outcome)
        return bool(ended)

    def write(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        states = {
            name: {
                "state": "done" if end.ok else "failed",
                "seconds": end.seconds,
                "why": end.why,
                "failures": end.failures,
            }
            for name, end in self.outcomes.items()
        }
        states |= {
            name: {"state": "running", "command": plan.command(job)}
            for name, (job, _) in self.running.items()
        }
        replace_text(epath.Path(self.root / "sweep.json"), json.dumps(to_json(states), indent=1) + "\n")

    def _log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

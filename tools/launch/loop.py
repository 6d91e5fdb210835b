"""The one loop of a sweep: start what can run, note what has ended, until nothing more can."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from etils import epath

from configs.study import Study
from runtime.run_record import replace_text
from runtime.writers import to_json
from tools.launch import plan, status
from tools.launch.local import Launcher
from tools.launch.plan import Job, Outcome
from tools.launch.show import Show

POLL = 1.0  # seconds between looks


def sweep(
    study: Study, root: Path, launcher: Launcher, show: Show, *, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Outcome]:
    """Runs the study in ``root`` as far as it can be, and says how every job ended, by name.

    What is there already is not run again; a job that failed in an earlier sweep is tried once more, a
    training from its last checkpoint. ``root/sweep.json`` tells the same to who looks in meanwhile.

    Raises:
        ConfigError: a config cannot be made.
        KeyboardInterrupt: after the running jobs have saved and left.
    """
    outcomes: dict[str, Outcome] = {}
    running: dict[str, tuple[Job, float]] = {}
    news = True
    try:
        while True:
            if news:
                news = _start(study, root, launcher, show, outcomes, running)
            if not running and not news:
                return outcomes
            for name, code in launcher.ended().items():
                job, begin = running.pop(name)
                outcomes[name] = status.ended(job, code, _log(root, name), time.monotonic() - begin)
                show.ended(job, outcomes[name])
                news = True
            _write(root / "sweep.json", outcomes, running)
            show.update(outcomes, [job for job, _ in running.values()])
            if not news:
                sleep(POLL)
    finally:
        if running:
            show.say(f"stopping {len(running)} of the study's jobs; they save and leave")
            launcher.stop()


def _start(
    study: Study,
    root: Path,
    launcher: Launcher,
    show: Show,
    outcomes: dict[str, Outcome],
    running: dict[str, tuple[Job, float]],
) -> bool:
    """Fills the free slots. Whether jobs were found that had ended before: others may wait for them."""
    news = False
    for job in list(plan.jobs(study, root, outcomes)):
        if job.name in outcomes or job.name in running:
            continue
        there = status.found(job)
        if there is not None:
            outcomes[job.name], news = there, True
            show.ended(job, there, before=True)
        elif len(running) < launcher.slots:
            show.say(plan.command(job))
            launcher.start(job.name, job.argv, _log(root, job.name))
            running[job.name] = job, time.monotonic()
    return news


def _log(root: Path, name: str) -> Path:
    return root / "logs" / f"{name}.log"


def _write(path: Path, outcomes: dict[str, Outcome], running: dict[str, tuple[Job, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {
        name: {"state": "done" if end.ok else "failed", "seconds": end.seconds, "why": end.why}
        for name, end in outcomes.items()
    }
    states |= {name: {"state": "running", "command": plan.command(job)} for name, (job, _) in running.items()}
    replace_text(epath.Path(path), json.dumps(to_json(states), indent=1) + "\n")

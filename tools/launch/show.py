"""What a person sees of a sweep: a bar over its runs with the time that is left, and a line for each end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.launch import status
from tools.launch.plan import Job, Outcome, Run

SHOWN = 4  # names of running jobs in the bar


class Show:
    """Use it as a context.

    Args:
        runs, examinations: how many there will be.
    """

    def __init__(
        self, name: str, runs: int, examinations: int, slots: int = 1, console: Console | None = None
    ):
        self._runs, self._examinations, self._slots = runs, examinations, slots
        self._console = console or Console(soft_wrap=True, highlight=False, markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[left]}"), console=self._console)
        self._bar = self._progress.add_task(name, total=runs + examinations, left="")
        self._work: dict[str, tuple[float, float]] = {}  # of trainings that ended: tokens, seconds
        self._exams: list[float] = []  # seconds of examinations that ended
        self._jobs = 0

    def __enter__(self) -> Show:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text)

    def ended(self, job: Job, outcome: Outcome, *, before: bool = False) -> None:
        """Says how a job ended; ``before``: that it had, in an earlier sweep."""
        self._jobs += 1
        if outcome.ok and isinstance(job, Run):
            self._work[job.name] = job.work, outcome.seconds
        elif outcome.ok:
            self._exams.append(outcome.seconds)
        what = f"failed: {outcome.why}" if not outcome.ok else "found" if before else "done"
        metric = ""
        if outcome.ok and isinstance(job, Run) and job.arm.metric in outcome.result:
            metric = f", {job.arm.metric} {outcome.result[job.arm.metric]:.4f}"
        self.say(f"{job.name}: {what}{metric}")

    def update(self, outcomes: Mapping[str, Outcome], running: Sequence[Job]) -> None:
        """Moves the bar; a training in progress counts as the share of its steps."""
        trainings = [job for job in running if isinstance(job, Run)]
        shares = [status.step_of(job) / job.config.train.steps for job in trainings]
        at_once = min(max(len(running), 1), self._slots)  # a queue takes more than run
        left = self._left(sum(share * job.work for share, job in zip(shares, trainings)), at_once)
        names = ", ".join(job.name for job in running[:SHOWN]) + (" ..." if len(running) > SHOWN else "")
        self._progress.update(
            self._bar, completed=round(len(outcomes) + sum(shares), 2), left=f"{left}  {names}"
        )

    def _left(self, under_way: float, at_once: int) -> str:
        """Time for what remains, at the speed of what has ended; "" before anything has."""
        known = [(work, seconds) for work, seconds in self._work.values() if seconds == seconds]
        if not known:
            return ""
        mean = sum(work for work, _ in known) / len(known)
        work = max(mean * (self._runs - len(self._work)) - under_way, 0.0)
        seconds = work * sum(seconds for _, seconds in known) / max(sum(work for work, _ in known), 1.0)
        if self._exams:
            mean_exam = sum(self._exams) / len(self._exams)
            seconds += mean_exam * max(self._examinations - len(self._exams), 0)
        minutes = round(seconds / at_once / 60)
        return (
            f"about {minutes // 60} h {minutes % 60:02d} min left"
            if minutes >= 60
            else f"about {minutes} min left"
        )

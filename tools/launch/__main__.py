"""Run a study: ``python -m tools.launch --sweep=configs/sweeps/NAME.py[:PRESET] --workdir=DIR``.

Every run is a process of its own, its log under DIR/logs. Started again, it goes on where it stopped. What
fails is told, and the rest goes on. At the end, and when it is interrupted: DIR/study.html with its data in
DIR/study.json, and DIR/pictures/*.png.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from configs import study as studies
from configs.base import ConfigError
from configs.study import Study
from eval import probes
from eval.report import save
from eval.report.pictures import save_pictures
from eval.studies import ANALYSES
from tools.launch import gather, plan, status
from tools.launch.local import Launcher, LocalProcesses
from tools.launch.loop import sweep
from tools.launch.plan import Outcome
from tools.launch.show import Show


def run(study: Study, root: Path, launcher: Launcher, console: Console | None = None) -> dict[str, Outcome]:
    """Runs the study and writes its report, also of a part of it. Raises ConfigError, KeyboardInterrupt."""
    check(study)
    with Show(study, launcher.slots, console) as show:
        try:
            return sweep(study, root, launcher, show)
        finally:
            write(study, root, show.say)


def check(study: Study) -> None:
    """Raises ConfigError for an analysis or a probe that does not exist."""
    if study.analysis not in ANALYSES:
        raise ConfigError(f"{study.name}: analysis={study.analysis!r}; there are {', '.join(ANALYSES)}")
    for arm in study.arms:
        for examination in arm.examinations:
            try:
                probes.choose(",".join(examination.probes), examination.settings)
            except ValueError as error:
                raise ConfigError(f"{study.name}, arm {arm.name}: {error}") from error


def write(study: Study, root: Path, say: Callable[[str], None]) -> None:
    """The report of what is in ``root`` now."""
    outcomes = found(study, root)
    report = gather.report(study, root, outcomes)
    page = save(report, root / "study.html")
    pictures = save_pictures(report, root / "pictures")
    for finding in report.data["findings"]:
        say(f"{finding['verdict']}: {finding['claim']}. {finding['found']}")
    say(f"{page}, data in {page.with_suffix('.json')}, {len(pictures)} pictures in {root / 'pictures'}")


def found(study: Study, root: Path) -> dict[str, Outcome]:
    """The jobs that have ended, by name, as the files in ``root`` tell."""
    outcomes = status.failures(root)
    looked = set[str]()
    while True:
        new = [job for job in plan.jobs(study, root, outcomes) if job.name not in looked]
        if not new:
            return {
                job.name: outcomes[job.name]
                for job in plan.jobs(study, root, outcomes)
                if job.name in outcomes
            }
        looked |= {job.name for job in new}
        outcomes |= {job.name: there for job in new if (there := status.found(job)) is not None}


def listing(study: Study, root: Path) -> list[str]:
    """The commands that are known now, those that are done marked, and how many there will be."""
    outcomes = found(study, root)
    done = sum(end.ok for end in outcomes.values())
    lines = []
    for job in plan.jobs(study, root, outcomes):
        ended = outcomes.get(job.name)
        mark = "" if ended is None else "# done: " if ended.ok else "# failed, to be tried again: "
        lines.append(mark + plan.command(job))
    return [
        *lines,
        f"# {study.name}: {study.runs} trainings of {len(study.arms)} arms and {study.examinations} "
        f"examinations, {done} done. Seeds are listed once the rate of their arm is chosen, examinations "
        "once their run is there.",
    ]


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m tools.launch", allow_abbrev=False)
    options.add_argument("--sweep", required=True, help="configs/sweeps/NAME.py[:PRESET]")
    options.add_argument("--workdir", required=True, help="local directory of the study")
    options.add_argument("--jobs", type=int, default=1, help="runs at once")
    options.add_argument("--dry-run", action="store_true", help="list the commands and run nothing")
    options.add_argument(
        "--report", action="store_true", help="write the report of what is there, run nothing"
    )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    given = options.parse_args(argv)
    root = Path(given.workdir).absolute()
    if given.jobs < 1:
        options.error(f"--jobs={given.jobs} should be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its jobs must not go on alone
    try:
        study = studies.load(given.sweep)
        if given.dry_run:
            check(study)
            print("\n".join(listing(study, root)))
        elif given.report:
            check(study)
            write(study, root, print)
        else:
            outcomes = run(study, root, LocalProcesses(given.jobs, root / "lock"))
            if failed := [name for name, end in outcomes.items() if not end.ok]:
                sys.exit(f"{len(failed)} of {len(outcomes)} jobs failed: {', '.join(failed)}")
    except (ConfigError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()

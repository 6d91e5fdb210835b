"""Run a sweep or a study, on this machine, a cluster or Ray, and report what it found.

``python -m tools.launch --sweep=configs/sweeps/NAME.py[:PRESET] --workdir=DIR [--executor=local|slurm|ray]
[--jobs=N] [--set KEY=VALUE] [--retries=N] [--search=N] [--dry-run] [--report]``

The file has ``get_sweep(arg)`` that yields overrides, ``space(trial)`` for ``--search`` (`configs.trials`),
or ``get_study(arg)`` (`configs.study`). Every run is a process of its own, its log under DIR/logs. Started
again, after an interruption, kill -9 or a failure, the same command goes on where it stopped. What fails is
tried again ``--retries`` times, then told, and the rest goes on. At the end, and when it is interrupted: a
table of all runs, on the terminal and in DIR/results.csv and DIR/results.json; DIR/study.html with its data
in DIR/study.json; and DIR/pictures/*.png.

``--executor=slurm`` hands arrays of jobs to SLURM through submitit: ``--set partition=gpu --set gpus=1 --set
time=600`` (minutes; cpus, mem in GB, and whatever sbatch knows). ``--set cluster=local`` takes the same path
to processes of this machine. ``--executor=ray`` starts Ray here, or joins it: ``--set address=auto``; cpus
and gpus are what one job takes. ``--executor=local --jobs=2 --set devices=0,1`` gives each of two jobs a GPU
of its own.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from configs import trials
from configs.base import ConfigError
from configs.study import Study
from eval.report import save
from eval.report.pictures import save_pictures
from tools.launch import gather, plan, results
from tools.launch.checks import check
from tools.launch.executor import MANY, Executor
from tools.launch.local import LocalProcesses
from tools.launch.loop import Grow, sweep
from tools.launch.plan import Outcome
from tools.launch.search import Search
from tools.launch.show import Show
from tools.launch.task import hold

EXECUTORS = ("local", "slurm", "ray")


def run(
    study: Study,
    root: Path,
    executor: Executor,
    console: Console | None = None,
    *,
    retries: int = 0,
    search: Search | None = None,
    total: int = 0,
) -> dict[str, Outcome]:
    """Runs the study and writes its table and report, also of a part of it.

    Args:
        search: adds arms to the study until there are ``total``.

    Raises:
        ConfigError: the study cannot run, or another launcher works in ``root``.
        KeyboardInterrupt: after the running jobs have saved and left.
    """
    check(study)
    console = console or Console(soft_wrap=True, highlight=False, markup=False)
    lock = hold(root / "lock")
    if lock is None:
        raise ConfigError(f"{root / 'lock'} is held: another launcher works there; wait for it, or stop it")
    grow: Grow = search.study if search else lambda outcomes: study
    with lock, Show(study.name, total or study.runs, study.examinations, executor.slots, console) as show:
        try:
            return sweep(grow, root, executor, show, retries=retries)
        finally:
            write(search.known() if search else study, root, console)


def write(study: Study, root: Path, console: Console) -> None:
    """The table and the report of what is in ``root`` now."""
    outcomes = results.found(study, root)
    rows = results.rows_of(study, root, outcomes)
    tables = results.write(rows, root)
    report = gather.report(study, root, outcomes)
    page = save(report, root / "study.html")
    pictures = save_pictures(report, root / "pictures")
    for finding in report.data["findings"]:
        console.print(f"{finding['verdict']}: {finding['claim']}. {finding['found']}")
    console.print(results.table_of(study, rows))
    for line in results.failures(outcomes):
        console.print(line)
    console.print(
        f"{page}, data in {page.with_suffix('.json')}; the table in {tables[0]} and {tables[1].name}; "
        f"{len(pictures)} pictures in {root / 'pictures'}"
    )


def listing(study: Study, root: Path) -> list[str]:
    """The commands that are known now, those that are done marked, and how many there will be."""
    outcomes = results.found(study, root)
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
    options.add_argument("--workdir", required=True, help="local directory of the sweep")
    options.add_argument("--executor", choices=EXECUTORS, default="local", help="where the runs run")
    options.add_argument(
        "--jobs", type=int, help="runs at once (local, and slurm with cluster=local: 1; else all that can)"
    )
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the executor, such as partition=gpu",
    )
    options.add_argument("--retries", type=int, default=1, help="further tries of a run that failed (1)")
    options.add_argument(
        "--search", type=int, default=0, metavar="N", help="N trials of the file's space(trial)"
    )
    options.add_argument("--dry-run", action="store_true", help="list the commands and run nothing")
    options.add_argument(
        "--report", action="store_true", help="write the report of what is there, run nothing"
    )
    return options


def executor_of(name: str, jobs: int | None, root: Path, settings: Sequence[str]) -> Executor:
    """The executor of the command line; raises ConfigError for what it lacks or does not know."""
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as partition=gpu")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    if name == "local":
        return LocalProcesses(jobs or 1, given)
    if name == "ray":
        from tools.launch.on_ray import RayTasks

        return RayTasks(jobs or MANY, given)
    from tools.launch.cluster import SubmittedJobs

    queue = given.get("cluster", "slurm") == "slurm"
    return SubmittedJobs(MANY if queue else jobs or 1, jobs or MANY, root, given)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    given = options.parse_args(argv)
    root = Path(given.workdir).absolute()
    for name, least in (("jobs", 1), ("retries", 0), ("search", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            options.error(f"--{name}={value} should be at least {least}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its jobs must not go on alone
    try:
        _main(given, root)
    except (ConfigError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


def _main(given: argparse.Namespace, root: Path) -> None:
    search = None
    if given.search:
        search = Search(trials.space_of(given.sweep), root, given.search, given.jobs or 1)
    study = search.known() if search else trials.load(given.sweep)
    if given.dry_run:
        check(study)
        print("\n".join(listing(study, root)))
        return
    if given.report:
        check(study)
        write(study, root, Console(soft_wrap=True, highlight=False, markup=False))
        return
    check(study)
    executor = executor_of(given.executor, given.jobs, root, given.set)
    outcomes = run(study, root, executor, retries=given.retries, search=search, total=given.search)
    if failed := [name for name, end in outcomes.items() if not end.ok]:
        sys.exit(f"{len(failed)} of {len(outcomes)} jobs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

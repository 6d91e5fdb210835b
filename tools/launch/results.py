"""What has become of every training of a sweep, as one table: on the terminal, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from rich.table import Table

from configs.study import Study
from eval.report.words import duration
from eval.studies.reading import number
from runtime.run_record import replace_text
from runtime.writers import to_json
from tools.launch import plan, status
from tools.launch.plan import Outcome, Run

Row = dict[str, Any]
STATES = ("done", "failed", "not run")


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


def rows_of(study: Study, root: Path, outcomes: Mapping[str, Outcome]) -> list[Row]:
    """One for each training that is known, the best first, those without a value last.

    "trial", "rate", "seed", "state" of `STATES`, "metric" and its "value", "seconds", "error"; "fields": what
    was overridden; "result": numbers of result.json.
    """
    rows = []
    for job in plan.jobs(study, root, outcomes):
        if not isinstance(job, Run):
            continue
        end = outcomes.get(job.name)
        result = {k: number(v) for k, v in end.result.items() if number(v) is not None} if end else {}
        rows.append(
            {
                "trial": job.arm.name,
                "rate": job.rate,
                "seed": job.seed,
                "state": STATES[2] if end is None else STATES[0] if end.ok else STATES[1],
                "metric": job.arm.metric,
                "value": result.get(job.arm.metric),
                "seconds": end.seconds if end else None,
                "error": _error(end) if end else "",
                "fields": dict(job.arm.overrides),
                "result": result,
            }
        )
    largest = {arm.name: arm.best == "max" for arm in study.arms}

    def order(row: Row) -> tuple[bool, str, float]:
        value = row["value"]
        if value is None or value != value:
            return True, row["metric"], 0.0
        return False, row["metric"], -value if largest[row["trial"]] else value

    return sorted(rows, key=order)


def write(rows: Sequence[Row], root: Path) -> tuple[Path, Path]:
    """``root/results.csv``, a column for each field and number, and ``root/results.json``."""
    flat = [{k: v for k, v in row.items() if k not in ("fields", "result")} | row["fields"] for row in rows]
    for line, row in zip(flat, rows):
        line |= {name: value for name, value in row["result"].items() if name not in line}
    columns = list(dict.fromkeys(column for line in flat for column in line))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    paths = root / "results.csv", root / "results.json"
    root.mkdir(parents=True, exist_ok=True)
    replace_text(epath.Path(paths[0]), text.getvalue())
    replace_text(epath.Path(paths[1]), json.dumps(to_json([*rows]), indent=1) + "\n")
    return paths


def table_of(study: Study, rows: Sequence[Row]) -> Table:
    """For the terminal: the columns in which the rows differ."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    shown = [name for name in ("rate", "seed") if len({row[name] for row in rows}) > 1]
    table = Table(title=study.name, title_justify="left")
    for column in ("trial", *shown, "state", "time", *metrics):
        table.add_column(column, justify="left" if column in ("trial", "state") else "right", overflow="fold")
    for row in rows:
        values = [
            f"{row['value']:.4f}" if metric == row["metric"] and row["value"] is not None else ""
            for metric in metrics
        ]
        time = "" if row["seconds"] is None else duration(row["seconds"])
        table.add_row(row["trial"], *(f"{row[name]:g}" for name in shown), row["state"], time, *values)
    return table


def failures(outcomes: Mapping[str, Outcome]) -> list[str]:
    """A line for each job that failed: its name, and why."""
    return [f"{name} failed: {_error(end)}" for name, end in outcomes.items() if not end.ok]


def _error(end: Outcome) -> str:
    return end.why + (f", tried {end.failures} times" if end.failures > 1 else "")

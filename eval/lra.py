"""The table of the Long Range Arena from runs: ``python -m eval.lra RUN [RUN...] [--out=FILE.json]``.

An accuracy is that of the test set at the best validation step, in percent: mean and sample standard
deviation over seeds, FAIL where every seed is at chance. Averages are of official data alone, by both
conventions: over five tasks, without Path-X (arXiv:2011.04006), and over six, where a FAIL with two classes
is scored 50 (as since S4). Stand-ins, reduced data and unfinished runs have rows of their own, without an
average.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from eval import arena
from eval.lra_published import COLUMNS, PUBLISHED
from eval.opened import RunError
from eval.report import chance
from eval.report.accuracy import at_best
from eval.report.gather import Run, read_run
from eval.report.groups import Group, group_runs
from models.registry import KINDS
from runtime.run_record import replace_text
from tasks.liftoff import AT_CHANCE

TEST, FAIL, MISSING = "test/accuracy", "FAIL", "-"
FIVE, SIX = COLUMNS[:-1], COLUMNS
FAIL_SCORE, TWO_CLASSES = 50.0, ("text", "retrieval", "pathfinder", "pathx")
RECIPE = re.compile(r"^lra_\w+:(?P<model>\w+)")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model on a task, in percent.

    Attributes:
        sd: sample standard deviation over seeds, None for one.
        failed: how many of ``accuracies`` are of runs that never left chance; None if one did not record it.
        departures: from the published data; with any, ``mean`` compares with nothing published.
    """

    mean: float
    sd: float | None = None
    accuracies: tuple[float, ...] = ()
    failed: int | None = 0
    departures: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()

    @property
    def at_chance(self) -> bool:
        """Whether no seed left it."""
        return self.failed == max(len(self.accuracies), 1)

    def __str__(self) -> str:
        if self.at_chance:
            return FAIL
        spread = "" if self.sd is None else f" ± {self.sd:.2f}"
        part = f" ({self.failed} of {len(self.accuracies)} {FAIL})" if self.failed else ""
        return f"{self.mean:.2f}{spread}{part}"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model over the tasks; either all of its cells are official, or none is."""

    model: str
    cells: Mapping[str, Cell]

    @property
    def official(self) -> bool:
        """Whether every cell is of official data as published."""
        return not any(cell.departures for cell in self.cells.values())

    def average(self, tasks: Sequence[str]) -> float | None:
        """Mean over ``tasks``; None unless all are there and official.

        Over `SIX` tasks a FAIL with two classes counts as 50. One with ten counts as what was measured, and
        so does every FAIL over `FIVE`.
        """
        if not self.official or not set(tasks) <= self.cells.keys():
            return None
        scored_50 = [t for t in tasks if tasks == SIX and t in TWO_CLASSES and self.cells[t].at_chance]
        return sum(FAIL_SCORE if t in scored_50 else self.cells[t].mean for t in tasks) / len(tasks)


def published() -> list[Row]:
    """The rows of `eval.lra_published`."""
    return [
        Row(name, {t: Cell(v) if v is not None else Cell(FAIL_SCORE, failed=1) for t, v in row.items()})
        for name, row in PUBLISHED.items()
    ]


def rows_of(runs: Sequence[Run]) -> tuple[list[Row], list[str]]:
    """The rows of ``runs``, official ones first, and why some runs are in none.

    Runs that differ in their seed only make one cell; a second setting of a model on a task another row.
    """
    rows, notes = list[tuple[str, bool, dict[str, Cell]]](), list[str]()
    for group in group_runs(runs):
        why = _left_out(group)
        if why:
            notes += [f"{run.workdir} is left out: {why}" for run in group.runs]
            continue
        task, cell, name = arena.task_of(group.runs[0].fields), cell_of(group), model_name(group.runs[0])
        official = not cell.departures
        if cell.failed is None:
            notes.append(f"{name} on {arena.TASKS[task]}: not known whether it left chance (no chance.json)")
        if any(row[:2] == (name, official) and task in row[2] for row in rows):
            name = f"{name} ({epath.Path(group.runs[0].workdir).name})"
        cells = next((found for *key, found in rows if key == [name, official]), None)
        if cells is None:
            cells = {}
            rows.append((name, official, cells))
        cells[task] = cell
    return [Row(name, cells) for name, _, cells in sorted(rows, key=lambda row: not row[1])], notes


def cell_of(group: Group) -> Cell:
    """The test accuracy of runs of one config at their best validation steps, in percent."""
    found = at_best(group, TEST)
    assert found is not None
    values = tuple(100 * value for value in found.values)
    known = all(chance.of_run(run) is not None for run in group.runs)
    unfinished = [run for run in group.runs if not run.finished and run.stopped != AT_CHANCE]
    departures = arena.departures(group.runs[0].fields)
    departures += [f"{run.workdir} is at step {run.step} of {run.steps}" for run in unfinished]
    return Cell(
        100 * found.mean,
        None if found.sd is None else 100 * found.sd,
        values,
        len(chance.failed(group.runs)) if known else None,
        tuple(departures),
        tuple(run.workdir for run in group.runs),
    )


def model_name(run: Run) -> str:
    """As the recipe calls it ("s4d" of "lra_image:s4d,smoke"), otherwise its mixers, joined by "+"."""
    recipe, pattern = RECIPE.match(run.name), str(run.fields.get("model.pattern", ""))
    mixers = {KINDS[letter].field: None for letter in pattern if letter in KINDS and letter != "-"}
    name = recipe["model"] if recipe else "+".join(mixers) or run.name
    return f"{name}, pretrained" if run.fields.get("init_from") else name


def _left_out(group: Group) -> str:
    run = group.runs[0]
    if run.kind != "classification" or not arena.task_of(run.fields):
        return "it is no run on a task of the Long Range Arena"
    if run.fields.get("task.pretrain"):
        return "it is pretrained without labels"
    return "" if at_best(group, TEST) else "it has recorded no accuracy on the test set"


def text(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Three tables: official runs, others with their departures, and what is published."""
    tasks = [*COLUMNS, *(["path256"] if any("path256" in row.cells for row in rows) else [])]
    blocks = [
        ("official data", [row for row in rows if row.official]),
        (
            "stand-ins and reduced settings: compare with nothing published",
            [r for r in rows if not r.official],
        ),
        ("published", published()),
    ]
    header = ["model", *(arena.TASKS[task] for task in tasks), "avg. 5", "avg. 6"]
    lines = {title: [_cells(row, tasks) for row in found] for title, found in blocks if found}
    widths = [max(map(len, column)) for column in zip(header, *(row for of in lines.values() for row in of))]
    out = []
    for title, found in lines.items():
        out += [title, _line(header, widths), *(_line(row, widths) for row in found), ""]
    for row in rows:
        for task, cell in row.cells.items():
            if cell.departures:
                out.append(f"{row.model}, {arena.TASKS[task]}: {'; '.join(cell.departures)}")
    return "\n".join([*out, *notes]).rstrip()


def _cells(row: Row, tasks: Sequence[str]) -> list[str]:
    averages = [row.average(FIVE), row.average(SIX)]
    shown = [str(row.cells[task]) if task in row.cells else MISSING for task in tasks]
    return [row.model, *shown, *(MISSING if a is None else f"{a:.2f}" for a in averages)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))
    )
    return "  ".join([first, *others])


def as_json(rows: Sequence[Row], notes: Sequence[str] = ()) -> dict[str, Any]:
    """The same as data."""

    def plain(row: Row) -> dict[str, Any]:
        cells = {t: {**dataclasses.asdict(c), "at_chance": c.at_chance} for t, c in row.cells.items()}
        averages = {"average_5": row.average(FIVE), "average_6": row.average(SIX)}
        return {"model": row.model, "official": row.official, "cells": cells, **averages}

    theirs = [{k: v for k, v in plain(row).items() if k != "official"} for row in published()]
    return {"runs": [plain(row) for row in rows], "published": theirs, "notes": list(notes)}


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m eval.lra", allow_abbrev=False)
    options.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run")
    options.add_argument("--out", help="FILE.json for the same as data")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    given = parser().parse_args(argv)
    try:
        runs = [read_run(workdir) for workdir in dict.fromkeys(given.runs)]
        rows, notes = rows_of(runs)
        if given.out:
            replace_text(epath.Path(given.out), json.dumps(as_json(rows, notes), indent=1) + "\n")
    except (RunError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(text(rows, notes))


if __name__ == "__main__":
    main()

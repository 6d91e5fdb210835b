"""A sweep in its simple form: its trials by the metric, and the metric along each number that was swept.

Factors: the fields that a trial overrides, and their values. Settings: "metric" of result.json, and "best" of
it ("min" or "max"). It has no findings: nothing published is set beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.report import words
from eval.report.document import Chart, Section, Table
from eval.report.groups import curve_series
from eval.studies.reading import SEEDS, curves, levels, number, over_seeds, result
from eval.studies.types import Analysis, Record

LINES = 8  # in a chart, at most
TOLD = "The best trial stands first. ± is the sample standard deviation over seeds."


def analyse(records: Sequence[Record], settings: Mapping[str, Any]) -> Analysis:
    name, largest = settings.get("metric", "validation/loss"), settings.get("best") == "max"
    arms = ranked(records, name, largest=largest)
    if not arms:
        return Analysis([], [])
    swept = [field for field in fields_of(records) if len({repr(r.factors.get(field)) for r in records}) > 1]
    charts = [chart for field in swept if (chart := _chart(records, field, swept, name)) is not None]
    sections = [Section("Trials", [_table(arms, swept, name)], TOLD)]
    return Analysis([], [*sections, Section("By what was swept", charts)] if charts else sections)


def ranked(records: Sequence[Record], metric: str, *, largest: bool) -> list[list[Record]]:
    """The records of each trial, the best trial first; those whose metric is no number come last."""
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record.arm, []).append(record)

    def order(arm: Sequence[Record]) -> tuple[bool, float]:
        found = over_seeds(arm, result(metric))
        if found is None or found.mean != found.mean:
            return True, 0.0
        return False, -found.mean if largest else found.mean

    return sorted(arms.values(), key=order)


def fields_of(records: Sequence[Record]) -> list[str]:
    """Every field that a trial overrides."""
    return list(dict.fromkeys(field for record in records for field in record.factors))


def _table(arms: Sequence[Sequence[Record]], swept: Sequence[str], metric: str) -> Table:
    rows = [
        [
            arm[0].arm,
            *(str(arm[0].factors.get(field, "as it is")) for field in swept),
            words.count(arm[0].parameters),
            str(len(arm)),
            words.plus_minus(over_seeds(arm, result(metric)), 4),
        ]
        for arm in arms
    ]
    header = ["trial", *swept, "parameters", "seeds", metric]
    return Table(header, rows, best=[(0, len(header) - 1)])


def _chart(records: Sequence[Record], field: str, swept: Sequence[str], metric: str) -> Chart | None:
    """The metric along a field of numbers, a line for each setting of the others; None for too many."""
    at = [number(value) for value in levels(records, field)]
    others: dict[str, list[Record]] = {}
    for record in records:
        rest = {other: record.factors.get(other) for other in swept if other != field}
        label = ", ".join(f"{other.rpartition('.')[2]} {value}" for other, value in rest.items())
        others.setdefault(label, []).append(record)
    if None in at or len(at) < 2 or len(others) > LINES:
        return None
    series = []
    for colour, (label, mine) in enumerate(others.items()):
        found = curves(mine, lambda record: number(record.factors.get(field)), result(metric))
        series += curve_series(label, found, colour=colour, marks=True)
    values = [value for value in at if value is not None]
    wide = min(values) > 0 and max(values) >= 4 * min(values)
    return Chart(f"{metric} by {field}", field, metric, series, SEEDS, log_x=wide)

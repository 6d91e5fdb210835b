"""Which architectures recall: associative recall, copying, a phone book; at equal size, and by state size.

Factors: "task" and "architecture"; "compared", true, for the arms of equal size; "d_state" for those of a
sweep over the state. Settings: "metric" of result.json (an accuracy), and "margin": what counts as a
difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval import fits
from eval.report.document import Chart, HeatMap, Section, Series
from eval.report.groups import curve_series
from eval.studies.reading import (
    SEEDS,
    Value,
    curves,
    difference,
    levels,
    number,
    over_seeds,
    result,
    signed,
    values,
    where,
)
from eval.studies.types import Analysis, Finding, Record, judge

METRIC, MARGIN = "validation/accuracy", 0.05
SIZED = re.compile(r"validation/accuracy_(\d+)_(\d+)$")
ATTENTION, STATE, HYBRID, FIXED = "attention", "mamba2", "hybrid", "s4d"


def analyse(records: Sequence[Record], settings: Mapping[str, Any]) -> Analysis:
    metric, margin = result(settings.get("metric", METRIC)), float(settings.get("margin", MARGIN))
    equal = where(records, compared=True)
    swept = [r for r in records if "d_state" in r.factors]
    findings = [
        *(_better(equal, task, ATTENTION, STATE, CLAIMS[task], metric, margin) for task in _known(equal)),
        *(_keeps_up(equal, task, metric, margin) for task in _known(equal)),
        *(_selects(equal, task, metric, margin) for task in _known(where(equal, architecture=FIXED))),
        *(_grows(swept, task, metric) for task in levels(swept, "task")),
    ]
    sections = []
    if equal:
        by_items = [_by_items(equal, task) for task in levels(equal, "task")]
        charts = [chart for chart in by_items if chart.series]
        sections.append(Section("By architecture", [_table(equal, metric), *charts]))
    if swept:
        sections.append(Section("By size of the state", [_by_state(swept, metric)]))
    return Analysis(findings, sections)


CLAIMS = {
    "mqar": "At equal size attention solves multi-query associative recall, fixed states do not "
    "(arXiv:2312.04927, figure 2)",
    "copying": "Transformers copy strings that state space models of equal size cannot (arXiv:2402.01032)",
    "phonebook": "A pure Mamba-2 finds numbers in a phone book worse than a transformer (arXiv:2406.07887)",
}
PUBLISHED_HYBRID = "A hybrid recalls as well as attention alone (arXiv:2406.07887)"
PUBLISHED_SELECTIVE = (
    "A state space model that selects what to keep recalls what S4 cannot (arXiv:2312.00752)"
)
PUBLISHED_STATE = "Recall grows with the size of the recurrent state (arXiv:2402.18668, arXiv:2405.21060)"


def _known(records: Sequence[Record]) -> list[str]:
    return [task for task in levels(records, "task") if task in CLAIMS]


def _better(
    records: Sequence[Record], task: str, one: str, other: str, claim: str, metric: Value, margin: float
) -> Finding:
    sides = [where(records, task=task, architecture=name) for name in (one, other)]
    apart, interval = difference(sides[0], sides[1], metric)
    return Finding(
        claim,
        f"accuracy of {one} less that of {other} above {margin:g} (contradicted: all below it)",
        f"{signed(apart, interval)}; {_means(sides, (one, other), metric)}",
        judge(interval, margin),
        {"task": task, "difference": apart, "interval": interval},
    )


def _keeps_up(records: Sequence[Record], task: str, metric: Value, margin: float) -> Finding:
    sides = [where(records, task=task, architecture=name) for name in (HYBRID, ATTENTION)]
    apart, interval = difference(sides[0], sides[1], metric)
    return Finding(
        f"{PUBLISHED_HYBRID}, here on {task}",
        f"accuracy of {HYBRID} less that of {ATTENTION} above -{margin:g}",
        f"{signed(apart, interval)}; {_means(sides, (HYBRID, ATTENTION), metric)}",
        judge(interval, -margin),
        {"task": task, "difference": apart, "interval": interval},
    )


def _selects(records: Sequence[Record], task: str, metric: Value, margin: float) -> Finding:
    return _better(records, task, STATE, FIXED, f"{PUBLISHED_SELECTIVE}, here on {task}", metric, margin)


def _grows(records: Sequence[Record], task: str, metric: Value) -> Finding:
    points = [(r.state_scalars, v) for r in where(records, task=task) if (v := metric(r)) is not None]
    criterion = "Spearman's rank correlation of accuracy with state size: its 95 % interval above 0"
    claim = f"{PUBLISHED_STATE}, here on {task}"
    if len({x for x, _ in points}) < 3:
        return Finding(claim, criterion, "fewer than 3 sizes", "not measured", {"task": task})
    found = fits.spearman(*zip(*points))
    low, high = found.interval
    said = f"{found.value:.2f} ({low:.2f} to {high:.2f}) over {found.points} runs"
    numbers = {"task": task, "correlation": found.value, "interval": found.interval}
    return Finding(claim, criterion, said, judge(found.interval), numbers)


def _means(sides: Sequence[Sequence[Record]], names: Sequence[str], metric: Value) -> str:
    said = []
    for name, side in zip(names, sides):
        found = values(side, metric)
        said.append(f"{name} {sum(found) / len(found):.3f}" if found else f"{name} not measured")
    return ", ".join(said)


def _table(records: Sequence[Record], metric: Value) -> HeatMap:
    tasks, names = levels(records, "task"), levels(records, "architecture")
    rows = []
    for name in names:
        found = [over_seeds(where(records, task=task, architecture=name), metric) for task in tasks]
        rows.append([math.nan if f is None else f.mean for f in found])
    return HeatMap("Accuracy", "task", "architecture", tasks, names, rows, caption="Mean over seeds.")


def _by_items(records: Sequence[Record], task: str) -> Chart:
    """Accuracy against how much there is to remember, where it was evaluated by size."""
    series: list[Series] = []
    for i, name in enumerate(levels(records, "architecture")):
        found = [_sizes(record) for record in where(records, task=task, architecture=name)]
        series += curve_series(name, found, colour=i, marks=True)
    caption = f"Of several lengths with as many things the shortest. {SEEDS}"
    return Chart(f"Accuracy on {task}", "things to remember", "accuracy", series, caption, log_x=True)


def _sizes(record: Record) -> dict[float, float]:
    """Accuracy by number of things, from the metrics "validation/accuracy_LENGTH_ITEMS"."""
    found: dict[float, tuple[int, float]] = {}
    for name in record.result:
        value = number(record.result[name])
        if (match := SIZED.match(name)) and value is not None:
            length, items = int(match[1]), float(match[2])
            if items not in found or length < found[items][0]:
                found[items] = length, value
    return {items: value for items, (_, value) in found.items()}


def _by_state(records: Sequence[Record], metric: Value) -> Chart:
    series: list[Series] = []
    for i, (name, task) in enumerate(
        (name, task) for name in levels(records, "architecture") for task in levels(records, "task")
    ):
        mine = where(records, task=task, architecture=name)
        found = curves(mine, lambda record: float(record.state_scalars), metric)
        series += curve_series(f"{name}, {task}", found, colour=i, marks=True)
    label = "numbers in the recurrent state"
    return Chart("Accuracy by state size", label, "accuracy", series, SEEDS, log_x=True)

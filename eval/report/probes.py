"""Whatever the probes of runs left: curves, one chart for each pair of axes; heat maps; and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.report import words
from eval.report.document import Chart, HeatMap, Section, Series, Table
from eval.report.gather import Probe, number
from eval.report.groups import Group, Statistic, curve_series


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve as it can be drawn; ``error`` is empty where none was recorded."""

    x: list[float]
    y: list[float]
    axes: tuple[str, str]
    error: list[float]


def probe_sections(groups: Sequence[Group]) -> list[Section]:
    """One section for each probe that any run has a result of."""
    names = sorted({name for group in groups for run in group.runs for name in run.probes})
    return [_section(groups, name) for name in names]


def _section(groups: Sequence[Group], name: str) -> Section:
    results = {group.label: _results(group, name) for group in groups}
    steps = sorted({probe.step for found in results.values() for probe in found})
    said = [f"Measured at step {words.listed([str(step) for step in steps])}."]
    missing = [label for label, found in results.items() if not found]
    if missing:
        said.append(f"{words.MISSING.capitalize()} for {words.listed(missing)}.")
    failures = [
        (label, p.failure.rstrip(".")) for label, found in results.items() for p in found if p.failure
    ]
    said += dict.fromkeys(f"{label}: no result, {why}." for label, why in failures)
    having = [group for group in groups if any(not probe.failure for probe in results[group.label])]
    blocks: list[Chart | HeatMap | Table] = [
        *_charts(having, name),
        *_heatmaps(having, name),
        *_tables(having, name),
    ]
    return Section(f"Probe: {name.replace('_', ' ')}", blocks, " ".join(said))


def _results(group: Group, name: str) -> list[Probe]:
    """Of the newest step that any run of the group was probed at: other steps have no common mean."""
    found = [run.probes[name] for run in group.runs if name in run.probes]
    newest = max((probe.step for probe in found), default=0)
    return [probe for probe in found if probe.step == newest]


def _charts(groups: Sequence[Group], name: str) -> list[Chart]:
    """Architectures are told apart by colour, and the curves that share a chart by dash."""
    every = {g.label: [_curves(probe) for probe in _results(g, name)] for g in groups}
    charts = []
    for xlabel, ylabel in dict.fromkeys(c.axes for f in every.values() for of in f for c in of.values()):
        named = [n for f in every.values() for of in f for n, c in of.items() if c.axes == (xlabel, ylabel)]
        curves, series = list(dict.fromkeys(named)), list[Series]()
        for group in groups:
            for i, curve in enumerate(curves):
                found = [of[curve] for of in every[group.label] if curve in of]
                if len(groups) == 1:  # it has the colours for its curves
                    series += _series(curve, found, i, i)
                elif len(curves) == 1:
                    series += _series(group.label, found, group.colour, None)
                else:
                    series += _series(f"{group.label}, {curve}", found, group.colour, i)
        xs = [x for s in series for x in s.x]
        log_x = min(xs) > 0 and max(xs) / min(xs) >= 8
        caption = "A band is ± one standard deviation over seeds, or the standard error of a single run."
        title = f"{ylabel[:1].upper()}{ylabel[1:]} by {xlabel}"
        charts.append(Chart(title, xlabel, ylabel, series, caption, log_x=log_x))
    return charts


def _series(label: str, curves: Sequence[Curve], colour: int, dash: int | None) -> list[Series]:
    points = [dict(zip(curve.x, curve.y)) for curve in curves]
    series = curve_series(label, points, colour=colour, dash=dash, marks=True)
    if len(series) != 1 or len(curves[0].error) != len(series[0].y):
        return series
    (only,), error = series, curves[0].error
    low, high = [y - e for y, e in zip(only.y, error)], [y + e for y, e in zip(only.y, error)]
    return [dataclasses.replace(only, low=low, high=high)]


def _curves(probe: Probe) -> dict[str, Curve]:
    """Those with as many x as y."""
    found = {}
    for name, curve in probe.curves.items():
        x, y, error = (curve.get(key) or [] for key in ("x", "y", "error"))
        if x and len(x) == len(y):
            axes = str(curve.get("xlabel", "x")), str(curve.get("ylabel", "y"))
            found[name] = Curve(
                [number(v) for v in x], [number(v) for v in y], axes, [number(v) for v in error]
            )
    return found


def _heatmaps(groups: Sequence[Group], name: str) -> list[HeatMap]:
    """Of each architecture its own; the mean over seeds where they have the same columns and rows."""
    drawn = []
    for group in groups:
        found: dict[str, list[HeatMap]] = {}
        for probe in _results(group, name):
            for title, grid in probe.grids.items():
                if heatmap := _heatmap(title if len(groups) == 1 else f"{group.label}, {title}", grid):
                    found.setdefault(heatmap.title, []).append(heatmap)
        for first, *others in found.values():
            alike = [first, *(o for o in others if (o.x, o.y) == (first.x, first.y))]
            mean = np.mean([heatmap.values for heatmap in alike], axis=0).tolist()
            high = max(heatmap.high for heatmap in alike)
            caption = f"Mean over {len(alike)} seeds." if len(alike) > 1 else ""
            drawn.append(dataclasses.replace(first, values=mean, high=high, caption=caption))
    return drawn


def _heatmap(title: str, grid: Mapping[str, Any]) -> HeatMap | None:
    """A recorded `eval.probes.types.Grid`; None if its numbers are not as many as its names say."""
    x, y = ([str(name) for name in grid.get(axis) or []] for axis in "xy")
    values = [[number(v) for v in row] for row in grid.get("values") or []]
    if not x or not y or [len(row) for row in values] != [len(x)] * len(y):
        return None
    low, high = (number(grid.get(end, default)) for end, default in (("low", 0.0), ("high", 1.0)))
    labels = str(grid.get("xlabel", "x")), str(grid.get("ylabel", "y"))
    return HeatMap(title, *labels, x, y, values, low, high)


def _tables(groups: Sequence[Group], name: str) -> list[Table]:
    """A row for each scalar; those by the same keys ("loss.1x", "loss.2x") in one row, a column for each."""
    shown = {
        group.label: [words.scalars(probe.numbers) for probe in _results(group, name)] for group in groups
    }
    names = list(dict.fromkeys(key for found in shown.values() for scalars in found for key in scalars))

    def cell(label: str, key: str) -> str:
        return _cell([scalars[key] for scalars in shown[label] if key in scalars])

    by_quantity: dict[str, list[str]] = {}
    for key in names:
        by_quantity.setdefault(key.partition(".")[0], []).append(key.partition(".")[2])
    series = {of: tuple(keys) for of, keys in by_quantity.items() if len(keys) > 1}
    single = [
        [key, *(cell(label, key) for label in shown)] for key in names if key.partition(".")[0] not in series
    ]
    tables = [Table(["number", *shown], single)] if single else []
    by_keys: dict[tuple[str, ...], list[str]] = {}
    for of, keys in series.items():
        by_keys.setdefault(keys, []).append(of)
    for keys, quantities in by_keys.items():
        rows = [
            [f"{of}, {label}" if len(shown) > 1 else of, *(cell(label, f"{of}.{key}") for key in keys)]
            for of in quantities
            for label in shown
        ]
        tables.append(Table(["number", *keys], rows))
    return tables


def _cell(values: Sequence[Any]) -> str:
    if values and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return words.significant(Statistic.of([float(v) for v in values]))
    return words.listed(sorted({str(v) for v in values})) or words.MISSING

"""The charts of a report of runs: learning curves, and whatever curves the probes left."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.report import words
from eval.report.document import Chart, Section, Series, Table
from eval.report.gather import Probe, Run, number
from eval.report.groups import Group, Statistic, curve_series

SMOOTHING = 0.05  # share of the training records that the running mean of the training loss is over
BEGINNING = 0.08  # share of the training that may lie above the chart


def references_of(run: Run) -> dict[str, float]:
    """Bits per byte of simple compressors on the run's validation text, by their names in words."""
    found = {}
    for name, value in run.result.items():
        if name.startswith("reference/"):
            key = name.removeprefix("reference/")
            found[words.REFERENCES.get(key, key.replace("_", " "))] = number(value)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def references(groups: Sequence[Group]) -> dict[str, float]:
    """Those of all runs; where runs on other texts have other values, the architecture is named."""
    found: dict[str, float] = {}
    for group in groups:
        for run in group.runs:
            for name, value in references_of(run).items():
                if found.setdefault(name, value) != value:
                    found[f"{name} ({group.label})"] = value
    return found


def learning_curves(groups: Sequence[Group], metrics: Sequence[str]) -> list[Chart]:
    """Held-out metrics and the training loss; of one architecture both in one chart."""
    runs = [run for group in groups for run in group.runs]
    training = next(
        (m for m in ("train/bits_per_byte", "train/loss") if any(run.curve(m) for run in runs)), ""
    )
    main = next((m for m in metrics if m.split("/")[1] == training.removeprefix("train/")), "")
    if len(groups) == 1 and training and main:
        (group,) = groups
        other = dataclasses.replace(group, colour=group.colour + 1)
        axis, xlabel = _axis(runs)
        series = curve_series(group, axis(main), main.split("/")[0], marks=True)
        series += curve_series(other, axis(training), "training, running mean", smooth=SMOOTHING, dash=0)
        charts = [_learning("Loss", series, xlabel, main, references(groups))]
        return charts + [_held_out(groups, m) for m in metrics if m != main]
    charts = [_held_out(groups, metric) for metric in metrics]
    if training:
        axis, xlabel = _axis(runs)
        series = [s for g in groups for s in curve_series(g, axis(training), g.label, smooth=SMOOTHING)]
        charts.append(_learning("Training loss, running mean", series, xlabel, training, {}))
    return charts


def _held_out(groups: Sequence[Group], metric: str) -> Chart:
    axis, xlabel = _axis([run for group in groups for run in group.runs])
    series = [s for g in groups for s in curve_series(g, axis(metric), g.label, marks=True)]
    title = words.metric(metric)
    shown = references(groups) if metric == "validation/bits_per_byte" else {}
    return _learning(title[:1].upper() + title[1:], series, xlabel, metric, shown)


def _axis(runs: Sequence[Run]) -> tuple[Callable[[str], Callable[[Run], dict[float, float]]], str]:
    """Steps, or tokens where the runs' batches differ in size."""
    sizes = {run.tokens_per_step for run in runs}
    if len(sizes) == 1 or None in sizes:
        return (lambda metric: lambda run: {float(s): v for s, v in run.curve(metric).items()}), "step"

    def by_tokens(metric: str) -> Callable[[Run], dict[float, float]]:
        return lambda run: {float(s * (run.tokens_per_step or 0)): v for s, v in run.curve(metric).items()}

    return by_tokens, "tokens seen"


def _learning(
    title: str, series: Sequence[Series], xlabel: str, metric: str, lines: Mapping[str, float]
) -> Chart:
    """A chart that shows all but the beginning, and the references that are near."""
    end = max((x for s in series for x in s.x), default=0.0)
    late = [y for s in series for x, y in zip(s.x, s.y) if x >= min(BEGINNING * end, s.x[-1])]
    late = [y for y in late if math.isfinite(y)]
    caption = []
    if any(s.thin for s in series):
        caption = [
            "Thin lines are single runs; the mean ± one standard deviation goes as far as all have got."
        ]
    near, span = dict[str, float](), None
    if late:
        low, high = min(late), max(late)
        reach = 0.5 * (high - low) or 0.1
        near = {name: value for name, value in lines.items() if low - reach <= value <= high + reach}
        low, high = min([low, *near.values()]), max([high, *near.values()])
        pad = 0.06 * (high - low) or 0.05
        span = (low - pad, high + pad)
        if any(y > span[1] for s in series for y in s.y):
            caption.append("The first steps lie above the chart.")
    if len(near) < len(lines):
        caption.append("References farther away are in the table only.")
    label = words.METRICS.get(metric.split("/")[1], metric.split("/")[1].replace("_", " "))
    return Chart(title, xlabel, label, series, " ".join(caption), near, y_range=span)


def probe_sections(groups: Sequence[Group]) -> list[Section]:
    """One section for each probe that any run has a result of."""
    names = sorted({name for group in groups for run in group.runs for name in run.probes})
    return [_probe_section(groups, name) for name in names]


def _probe_section(groups: Sequence[Group], name: str) -> Section:
    results = [(g, probe) for g in groups for run in g.runs if (probe := run.probes.get(name))]
    steps = sorted({probe.step for _, probe in results})
    said = [f"Measured at step {words.listed([str(s) for s in steps])}."]
    failures = dict.fromkeys(
        f"{g.label}: no result, {p.failure.rstrip('.')}." for g, p in results if p.failure
    )
    missing = [g.label for g in groups if all(g is not other for other, _ in results)]
    if missing:
        said.append(f"{words.MISSING.capitalize()} for {words.listed(missing)}.")
    having = [g for g in groups if any(g is other and not probe.failure for other, probe in results)]
    blocks: list[Chart | Table] = [*_probe_charts(having, name), *_probe_table(having, name)]
    return Section(f"Probe: {name.replace('_', ' ')}", blocks, " ".join([*said, *failures]))


def _probe_charts(groups: Sequence[Group], name: str) -> list[Chart]:
    """One chart for each pair of axes; the curves on it are told apart by dash, architectures by colour."""
    axes: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        for run in group.runs:
            for curve, points in _curves(run.probes.get(name)).items():
                curves = axes.setdefault((points["xlabel"], points["ylabel"]), [])
                if curve not in curves:
                    curves.append(curve)
    charts = []
    for (xlabel, ylabel), curves in axes.items():
        series = []
        for group in groups:
            for i, curve in enumerate(curves):
                if len(groups) == 1:  # it has the colours for its curves
                    series += _probe_series(dataclasses.replace(group, colour=i), name, curve, curve, i)
                else:
                    label = group.label if len(curves) == 1 else f"{group.label}, {curve}"
                    series += _probe_series(group, name, curve, label, None if len(curves) == 1 else i)
        xs = [x for s in series for x in s.x]
        log_x = bool(xs) and min(xs) > 0 and max(xs) / min(xs) >= 8
        caption = "A band is ± one standard deviation over seeds, or the standard error of a single run."
        title = f"{ylabel[:1].upper()}{ylabel[1:]} by {xlabel}"
        charts.append(Chart(title, xlabel, ylabel, series, caption, log_x=log_x))
    return charts


def _probe_series(group: Group, name: str, curve: str, label: str, dash: int | None) -> list[Series]:
    def points(run: Run) -> dict[float, float]:
        found = _curves(run.probes.get(name)).get(curve)
        return dict(zip(found["x"], found["y"])) if found else {}

    series = curve_series(group, points, label, dash=dash, marks=True)
    if len(series) == 1:
        errors = [
            found["error"]
            for run in group.runs
            if (found := _curves(run.probes.get(name)).get(curve)) and found["error"]
        ]
        (only,) = series
        if errors and len(errors[0]) == len(only.y):
            low = [y - e for y, e in zip(only.y, errors[0])]
            high = [y + e for y, e in zip(only.y, errors[0])]
            return [dataclasses.replace(only, low=low, high=high)]
    return series


def _curves(probe: Probe | None) -> dict[str, dict[str, Any]]:
    """The curves that can be drawn, with x and y as floats and their labels."""
    found = {}
    for name, curve in (probe.curves if probe else {}).items():
        x, y = curve.get("x") or [], curve.get("y") or []
        if len(x) == len(y) and x:
            found[name] = {
                "x": [number(v) for v in x],
                "y": [number(v) for v in y],
                "xlabel": str(curve.get("xlabel", "x")),
                "ylabel": str(curve.get("ylabel", "y")),
                "error": [number(v) for v in curve.get("error") or []],
            }
    return found


def _probe_table(groups: Sequence[Group], name: str) -> list[Table]:
    """Scalars of the probe, a row each; text only where it is short."""
    rows = {}
    shown = [
        [words.scalars(run.probes[name].numbers) for run in g.runs if name in run.probes] for g in groups
    ]
    for key in dict.fromkeys(key for of_group in shown for scalars in of_group for key in scalars):
        rows[key] = [_probe_cell([s[key] for s in of_group if key in s]) for of_group in shown]
    header = ["number", *(group.label for group in groups)]
    return [Table(header, [[key, *cells] for key, cells in rows.items()])] if rows else []


def _probe_cell(values: Sequence[Any]) -> str:
    if values and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return words.significant(Statistic.of([float(v) for v in values]))
    return words.listed(sorted({str(v) for v in values})) or words.MISSING

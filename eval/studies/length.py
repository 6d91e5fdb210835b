"""Longer than in training: who breaks, and what mends it without training and with it.

Factors: "architecture"; arms that went on at a longer context also have "longer", true. Examinations of the
probe length_extrapolation: "" for the run as it is, the others named by the mitigation that is switched on.
Every examination must read the same row lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval import fits
from eval.report import words
from eval.report.document import Chart, Section, Series, Table
from eval.report.groups import curve_series
from eval.studies.reading import SEEDS, levels, number, probed, signed, where
from eval.studies.types import Analysis, Finding, Record, judge

PROBE = "length_extrapolation"
PAPER = "arXiv:2410.07145"
METRICS = ("bits_per_byte", "loss")
MENDED = "Last targets by row length"
NORMAL = 1.96  # standard errors of a 95 % interval


def analyse(records: Sequence[Record], settings: Mapping[str, Any]) -> Analysis:
    plain = [r for r in records if not r.factors.get("longer")]
    findings, sections = [], []
    for name in levels(plain, "architecture"):
        mine = where(plain, architecture=name)
        findings.append(_breaks(mine, name))
        for mitigation in _mitigations(mine):
            findings.append(_mends(mine, name, mitigation))
        longer = where(records, architecture=name, longer=True)
        if longer:
            findings.append(_trained(mine, longer, name))
        if _mitigations(mine) or longer:
            sections.append(
                Section(name, [_chart(MENDED, _lines(mine, longer), _metric(mine[0])), _table(mine, longer)])
            )
    if plain:
        sections.insert(0, Section("As trained, by three protocols", _protocols(plain), PROTOCOLS))
    return Analysis(findings, sections)


PROTOCOLS = (
    "The end of rows of growing length (last-k at window); longer rows in windows of growing length (sliding "
    "window); and long documents by position (position curve)."
)


def _protocols(records: Sequence[Record]) -> list[Chart]:
    """The charts of those that were measured; a line for each architecture."""
    by_name = {name: where(records, architecture=name) for name in levels(records, "architecture")}
    charts = [
        _chart(
            title,
            {name: [curve(r) for r in mine] for name, mine in by_name.items()},
            _metric(records[0]),
            xlabel,
        )
        for title, xlabel, curve in (
            (MENDED, "row length", _curve),
            ("Sliding windows", "window length", _sliding),
            ("Position curve", "tokens of context", _positions),
        )
    ]
    return [chart for chart in charts if chart.series]


def _breaks(records: Sequence[Record], name: str) -> Finding:
    found = [_above(record) for record in records]
    mean, interval = _mean(found)
    longest = next((_longest(record) for record in records if _longest(record)), "the longest")
    return Finding(
        f"{name}: the loss rises beyond the training length ({PAPER} of Mamba-2)",
        f"loss of the same targets at {longest} less that at 1x above 0",
        signed(mean, interval),
        judge(interval),
        {"architecture": name, "at": longest, "above_1x": mean, "interval": interval},
    )


def _mends(records: Sequence[Record], name: str, mitigation: str) -> Finding:
    """How much less the loss rises, and what it costs where nothing was broken."""
    costs = [
        ours - theirs
        for r in records
        if (ours := _at(r, "1x", mitigation)) is not None and (theirs := _at(r, "1x")) is not None
    ]
    return _mended(
        records,
        [_above(record, mitigation) for record in records],
        f"{name}: {mitigation} keeps the loss from rising beyond the training length",
        f", at 1x {sum(costs) / len(costs):+.3f}" if costs else "",
        {"architecture": name, "mitigation": mitigation, "cost_at_1x": costs},
    )


def _trained(records: Sequence[Record], longer: Sequence[Record], name: str) -> Finding:
    """The rise over the same row lengths, from the training length of the first."""
    trained = number(probed(records[0], PROBE, "training_length")) if records else None
    rises: list[Measured | None] = []
    for record in longer:
        curve, above = _curve(record), _above(record)
        if trained is None or above is None or trained not in curve:
            rises.append(None)
        else:
            rises.append((curve[max(curve)] - curve[trained], above[1]))
    return _mended(
        records,
        rises,
        f"{name}: after training on longer text, states carried on, the loss does not rise ({PAPER})",
        "",
        {"architecture": name},
    )


def _mended(
    records: Sequence[Record],
    rises: Sequence[Measured | None],
    claim: str,
    beside: str,
    numbers: Mapping[str, Any],
) -> Finding:
    """``rises`` against those of ``records`` as trained; where these do not rise there is nothing to mend."""
    before = [_above(record) for record in records]
    mean, interval = _mean([_less(b, a) for b, a in zip(before, rises)])
    broken = judge(_mean(before)[1]) == "reproduced"
    return Finding(
        claim,
        "rise of the loss from the training length to the longest rows, as trained less with it, above 0",
        f"{signed(mean, interval)}{beside}{'' if broken else '; it did not rise'}",
        judge(interval) if broken else "not measured",
        {**numbers, "saved": mean, "interval": interval},
    )


Measured = tuple[float, float]  # a number and its standard error


def _mean(found: Sequence[Measured | None]) -> tuple[float, tuple[float, float]]:
    """Over seeds, with the interval of drawing them anew; of one run from its standard error over rows."""
    known = [f for f in found if f is not None]
    if not known:
        return math.nan, fits.UNKNOWN
    if len(known) > 1:
        numbers = [value for value, _ in known]
        return sum(numbers) / len(numbers), fits.mean_interval(numbers)
    ((value, error),) = known
    return value, (value - NORMAL * error, value + NORMAL * error)


def _less(one: Measured | None, other: Measured | None) -> Measured | None:
    """The difference, its error as if the two were independent, which is more than they are."""
    if one is None or other is None:
        return None
    return one[0] - other[0], math.hypot(one[1], other[1])


def _metric(record: Record, examination: str = "") -> str:
    return next((m for m in METRICS if probed(record, PROBE, m, examination=examination)), METRICS[-1])


def _at(record: Record, length: str, examination: str = "") -> float | None:
    return number(probed(record, PROBE, _metric(record, examination), length, examination=examination))


def _longest(record: Record, examination: str = "") -> str:
    """The name of the longest rows, such as "16x", "" for none."""
    lengths = probed(record, PROBE, "lengths", examination=examination) or {}
    return max(lengths, key=lambda name: lengths[name], default="")


def _above(record: Record, examination: str = "") -> Measured | None:
    """Loss at the longest rows less that at 1x, with its standard error over rows."""
    name, longest = f"{_metric(record, examination)}_above_1x", _longest(record, examination)
    value = number(probed(record, PROBE, name, longest, examination=examination))
    error = number(probed(record, PROBE, f"{name}_standard_error", longest, examination=examination))
    return None if value is None else (value, error or 0.0)


def _mitigations(records: Sequence[Record]) -> list[str]:
    return list(
        dict.fromkeys(name for r in records for name, found in r.probes.items() if name and PROBE in found)
    )


def _curve(record: Record, examination: str = "") -> dict[float, float]:
    """Loss by row length."""
    lengths = probed(record, PROBE, "lengths", examination=examination) or {}
    found = {float(at): _at(record, name, examination) for name, at in lengths.items()}
    return {at: value for at, value in found.items() if value is not None}


def _sliding(record: Record) -> dict[float, float]:
    """Loss by length of the window."""
    lengths = probed(record, PROBE, "lengths") or {}
    found = probed(record, PROBE, f"{_metric(record)}_sliding_window") or {}
    return {float(lengths[name]): value for name in found if (value := number(found[name])) is not None}


def _positions(record: Record) -> dict[float, float]:
    """Loss by context in long documents."""
    bins = probed(record, "loss_by_position", "bins", "long_documents") or {}
    metric = next((m for m in METRICS if m in bins), METRICS[-1])
    return {float(x): float(y) for x, y in zip(bins.get("context", ()), bins.get(metric, ()))}


def _lines(records: Sequence[Record], longer: Sequence[Record]) -> dict[str, list[dict[float, float]]]:
    lines = {"as trained": [_curve(r) for r in records]}
    lines |= {name: [_curve(r, name) for r in records] for name in _mitigations(records)}
    return lines | ({"trained longer": [_curve(r) for r in longer]} if longer else {})


def _chart(
    title: str, lines: Mapping[str, Sequence[dict[float, float]]], metric: str, xlabel: str = "row length"
) -> Chart:
    series: list[Series] = []
    for i, (name, curves) in enumerate(lines.items()):
        series += curve_series(name, curves, colour=i, marks=True)
    return Chart(title, xlabel, words.METRICS[metric], series, SEEDS, log_x=True)


def _table(records: Sequence[Record], longer: Sequence[Record]) -> Table:
    """Mean over seeds."""
    lines = _lines(records, longer)
    lengths = sorted({at for curves in lines.values() for curve in curves for at in curve})
    rows = []
    for name, curves in lines.items():
        cells = []
        for at in lengths:
            found = [curve[at] for curve in curves if at in curve]
            cells.append(f"{sum(found) / len(found):.3f}" if found else words.MISSING)
        rows.append([name, *cells])
    return Table(["row length", *(f"{at:g}" for at in lengths)], rows, "Mean over seeds.")

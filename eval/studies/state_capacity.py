"""How much a recurrent state holds: the laws of Stuffed Mamba (arXiv:2410.07145) fitted to own runs.

* T_forget(N_S): the shortest training length at which a model of N_S numbers in its state learns to forget:
  in much longer rows its loss never exceeds twice its maximum inside the training length.
* T_recall(N_S): the longest context at which it finds a passkey with more than 95 % accuracy, the best over
  training lengths.
* Whether the share of passkeys that it finds ranks with N_S at all, which also small models answer.

Factors: "measures" ("forget" or "recall"), "d_state", and "length" of training. The runs of "forget" are
examined by the probe state_collapse, those of "recall" by passkey. N_S is in thousands, T in tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval import fits
from eval.report import words
from eval.report.document import Chart, HeatMap, Section, Series
from eval.studies.reading import levels, number, probed, where
from eval.studies.types import Analysis, Finding, Record, judge

STYLE = "stuffed_mamba"
ACCURATE, GOOD_FIT, LIMIT = 0.95, 0.9, 2.0
STATE = "thousands of numbers in the recurrent state"
PAPER = "arXiv:2410.07145"
Points = list[tuple[float, float]]


def analyse(records: Sequence[Record], settings: Mapping[str, Any]) -> Analysis:
    forget, recall = (where(records, measures=what) for what in ("forget", "recall"))
    lines, curves = forget_points(forget), recall_points(recall)
    found_line = _fit(fits.linear, lines, 2)
    found_curve, straight = _fit(fits.exponential, curves, 3), _fit(fits.linear, curves, 2)
    findings, sections = [], []
    if forget:
        findings.append(_linear(lines, found_line, _censored(forget)))
        charts = _charts("Training length that it takes to learn to forget", "T_forget", lines, found_line)
        sections.append(Section("Forgetting", [*charts, forgets_map(forget), growth_map(forget)]))
    if recall:
        findings += [_ranks(recall), _exponential(curves, found_curve, straight)]
        charts = _charts("Longest context with a passkey found", "T_recall", curves, found_curve)
        maps = [accuracy_map(recall, what) for what in ("exact_match", "per_digit")]
        sections.append(Section("Recall", [*charts, *(drawn for drawn in maps if drawn.x)]))
    return Analysis(findings, sections)


def forgets(record: Record) -> bool | None:
    """Whether the model has learned to forget; None where that was not measured."""
    found = number(probed(record, "state_collapse", "forgets"))
    return None if found is None else bool(found)


def accuracy_by_length(record: Record, what: str = "exact_match") -> dict[int, float]:
    """Of the passkey by context length, the mean over depths: of whole keys, or "per_digit"."""
    lengths = probed(record, "passkey", "lengths") or {}
    found = {at: number(probed(record, "passkey", f"{STYLE}_{what}", name)) for name, at in lengths.items()}
    return {at: value for at, value in sorted(found.items()) if value is not None}


def forget_points(records: Sequence[Record]) -> Points:
    """(N_S, T_forget) for each state size and seed where a length was found, and one below it was not.

    Without one below, T_forget is at most what was tried; without one at all it is more: neither is a point.
    """
    points = []
    for d_state in levels(records, "d_state"):
        for seed in {r.seed for r in records}:
            mine = [r for r in where(records, d_state=d_state) if r.seed == seed and forgets(r) is not None]
            mine.sort(key=lambda r: r.factor("length"))
            learned = [r for r in mine if forgets(r)]
            if learned and learned[0] is not mine[0]:
                points.append((learned[0].state_scalars / 1e3, float(learned[0].factor("length"))))
    return sorted(points)


def recall_points(records: Sequence[Record]) -> Points:
    """(N_S, T_recall) for each state size and seed, the best over training lengths; those above 0."""
    points = []
    for d_state in levels(records, "d_state"):
        for seed in {r.seed for r in records}:
            mine = [r for r in where(records, d_state=d_state) if r.seed == seed]
            reached = [at for r in mine for at, value in accuracy_by_length(r).items() if value > ACCURATE]
            if reached:
                points.append((mine[0].state_scalars / 1e3, float(max(reached))))
    return sorted(points)


def found_points(records: Sequence[Record]) -> Points:
    """(N_S, share of passkeys found) of each state size and seed, the mean over contexts.

    At a context the best over training lengths counts; a context that not every point has is left out.
    """
    best: dict[tuple[float, int], dict[int, float]] = {}
    for record in records:
        mine = best.setdefault((record.state_scalars / 1e3, record.seed), {})
        for at, value in accuracy_by_length(record).items():
            mine[at] = max(value, mine.get(at, 0.0))
    measured = {key: found for key, found in best.items() if found}
    shared = set.intersection(*map(set, measured.values())) if measured else set()
    if not shared:
        return []
    return sorted((n, sum(found[at] for at in shared) / len(shared)) for (n, _), found in measured.items())


def _fit(law: Any, points: Points, parameters: int) -> fits.Fit | None:
    """None where there are too few different sizes."""
    if len({x for x, _ in points}) < parameters:
        return None
    return law(*zip(*points))


def _censored(records: Sequence[Record]) -> str:
    """How many sizes have no T_forget inside the lengths that were tried."""
    always = never = 0
    for d_state in levels(records, "d_state"):
        mine = sorted(where(records, d_state=d_state), key=lambda r: r.factor("length"))
        found = [forgets(r) for r in mine if forgets(r) is not None]
        always += bool(found and found[0])
        never += bool(found and not any(found))
    said = [f"{words.plural(always, 'size')} already at the shortest length tried"] if always else []
    said += [f"{never} at none"] if never else []
    return ", ".join(said)


def _linear(points: Points, fit: fits.Fit | None, censored: str) -> Finding:
    claim = f"T_forget grows linearly with N_S: 5.172 N_S - 4.469, N_S in millions, T in thousands ({PAPER})"
    criterion = f"slope: 95 % interval above 0, R2 above {GOOD_FIT:g}"
    beside = f"; {censored}" if censored else ""
    if fit is None or math.isnan(fit.r2):
        said = f"{len(points)} points, too few to test a line{beside}"
        return Finding(claim, criterion, said, "not measured", {"points": points})
    said = f"{_spelt(fit)}{beside}"
    verdict = judge(fit.intervals["a"], clear=fit.r2 > GOOD_FIT)
    return Finding(claim, criterion, said, verdict, _numbers(fit, points))


def _ranks(records: Sequence[Record]) -> Finding:
    claim = f"the larger the recurrent state, the more passkeys are found ({PAPER})"
    criterion = "Spearman's rank correlation of passkeys found with N_S: its 95 % interval above 0"
    points = found_points(records)
    if len({x for x, _ in points}) < 3:
        return Finding(claim, criterion, "fewer than 3 sizes", "not measured", {"points": points})
    found = fits.spearman(*zip(*points))
    low, high = found.interval
    said = f"{found.value:.2f} ({low:.2f} to {high:.2f}) over {words.plural(found.points, 'run')}"
    numbers = {"correlation": found.value, "interval": found.interval, "points": points}
    return Finding(claim, criterion, said, judge(found.interval), numbers)


def _exponential(points: Points, fit: fits.Fit | None, straight: fits.Fit | None) -> Finding:
    claim = (
        f"T_recall grows exponentially with N_S: 4.756 (1.365^N_S - 1) - 0.742, N_S in millions, T in "
        f"thousands ({PAPER})"
    )
    criterion = f"a > 0, R2 above {GOOD_FIT:g}, and above that of a line (contradicted: T falls with N_S)"
    if fit is None or straight is None or math.isnan(fit.r2):
        said = f"{len(points)} points, too few to test an exponential"
        return Finding(claim, criterion, said, "not measured", {"points": points})
    clear = fit.r2 > GOOD_FIT and fit.r2 > straight.r2
    said = f"{_spelt(fit)}; a line: R2 = {straight.r2:.3f}"
    verdict = judge(fit.intervals["a"], clear=clear)
    return Finding(claim, criterion, said, verdict, _numbers(fit, points) | {"r2_of_a_line": straight.r2})


def _spelt(fit: fits.Fit) -> str:
    parts = []
    for name, value in fit.parameters.items():
        low, high = fit.intervals[name]
        parts.append(f"{name} = {value:.4g} ({low:.4g} to {high:.4g})")
    return (
        f"T = {fit.law.replace('x', 'N_S')} with {', '.join(parts)}, R2 = {fit.r2:.3f}, {fit.points} points"
    )


def _law(fit: fits.Fit) -> str:
    """With its numbers: "T = 3.1 x + 20"."""
    law = fit.law
    for name, value in fit.parameters.items():
        law = re.sub(rf"\b{name}\b", f"{value:.4g}", law)
    return f"T = {law}"


def _numbers(fit: fits.Fit, points: Points) -> dict[str, Any]:
    fields = {"law": fit.law, "parameters": fit.parameters, "intervals": fit.intervals, "r2": fit.r2}
    return fields | {"points": points}


def _charts(title: str, label: str, points: Points, fit: fits.Fit | None) -> list[Chart]:
    """One, or none without a point."""
    if not points:
        return []
    series = [Series(label, [x for x, _ in points], [y for _, y in points], marks=True, line=False)]
    if fit is not None:
        x = np.linspace(min(x for x, _ in points), max(x for x, _ in points), 60)
        series.append(Series(_law(fit), x.tolist(), fit(x).tolist(), colour=1, dash=0))
    return [Chart(title, STATE, f"{label}, tokens", series, "A point is a state size and a seed.")]


def forgets_map(records: Sequence[Record]) -> HeatMap:
    """Share of seeds that have learned to forget."""
    cells = [[_mean(map(forgets, found)) for found in row] for row in _by_length(records)]
    return _map(records, "Learned to forget, share of seeds", cells, 0.0, 1.0)


def growth_map(records: Sequence[Record]) -> HeatMap:
    """What `forgets` is decided by."""

    def growth(record: Record) -> float | None:
        return number(probed(record, "state_collapse", "loss_growth", "text"))

    cells = [[_mean(map(growth, found)) for found in row] for row in _by_length(records)]
    return _map(records, "Largest loss beyond the training length / within it", cells, 1.0, LIMIT)


def accuracy_map(records: Sequence[Record], what: str) -> HeatMap:
    """By context length, of the training length that is best there; the mean over seeds."""
    sizes, best = sorted(levels(records, "d_state")), dict[tuple[int, int, int], float]()
    for record in records:
        for at, value in accuracy_by_length(record, what).items():
            key = record.factor("d_state"), at, record.seed
            best[key] = max(value, best.get(key, 0.0))
    lengths = sorted({at for _, at, _ in best})
    rows = [[_mean(v for (m, at, _), v in best.items() if (m, at) == (n, t)) for t in lengths] for n in sizes]
    columns, names = [str(t) for t in lengths], [str(n) for n in sizes]
    caption = "Of the best training length. Mean over seeds."
    title = {"exact_match": "Passkeys found", "per_digit": "Digits of the passkey right"}[what]
    return HeatMap(title, "context length", "d_state", columns, names, rows, caption=caption)


def _by_length(records: Sequence[Record]) -> list[list[list[Record]]]:
    """The records of each state size (rows) and training length (columns)."""
    lengths, sizes = sorted(levels(records, "length")), sorted(levels(records, "d_state"))
    return [[where(records, d_state=n, length=t) for t in lengths] for n in sizes]


def _mean(found: Iterable[float | None]) -> float:
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else math.nan


def _map(records: Sequence[Record], title: str, rows: list[list[float]], low: float, high: float) -> HeatMap:
    columns, names = ([str(v) for v in sorted(levels(records, factor))] for factor in ("length", "d_state"))
    return HeatMap(title, "training length", "d_state", columns, names, rows, low, high, "Mean over seeds.")

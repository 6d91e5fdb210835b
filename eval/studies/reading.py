"""Numbers of records: by factor, over seeds, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval import fits
from eval.report.groups import Statistic
from eval.studies.types import Record

Value = Callable[[Record], float | None]
SEEDS = "A band is ± one standard deviation over seeds; thin lines are single seeds."


def result(name: str) -> Value:
    """The metric of result.json, None where a run has none."""
    return lambda record: number(record.result.get(name))


def number(value: Any) -> float | None:
    """A float of a recorded value ("nan" and "inf" are written as text); None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def probed(record: Record, probe: str, *path: str, examination: str = "") -> Any:
    """What lies at ``path`` in the numbers of a probe; None where any of it is not there."""
    node: Any = record.probes.get(examination, {}).get(probe)
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def where(records: Iterable[Record], **factors: Any) -> list[Record]:
    """Those with these factors."""
    return [r for r in records if all(r.factors.get(k, object()) == v for k, v in factors.items())]


def levels(records: Iterable[Record], factor: str) -> list[Any]:
    """The values of a factor, in the order of the arms."""
    return list(dict.fromkeys(r.factors[factor] for r in records if factor in r.factors))


def values(records: Iterable[Record], value: Value) -> list[float]:
    """Of every record that has it."""
    return [v for r in records if (v := value(r)) is not None]


def over_seeds(records: Iterable[Record], value: Value) -> Statistic | None:
    """Mean and deviation; None if no record has it."""
    return Statistic.of(values(records, value))


def curves(records: Iterable[Record], x: Value, y: Value) -> list[dict[float, float]]:
    """One curve for each seed, over the records that have both."""
    by_seed: dict[int, dict[float, float]] = {}
    for record in records:
        at, value = x(record), y(record)
        if at is not None and value is not None:
            by_seed.setdefault(record.seed, {})[at] = value
    return list(by_seed.values())


def difference(
    ours: Sequence[Record], theirs: Sequence[Record], value: Value
) -> tuple[float, tuple[float, float]]:
    """Mean of ``ours`` less that of ``theirs``, and a 95 % interval of it.

    The interval is of the seeds drawn anew on both sides. With one seed on a side it is the difference alone,
    (d, d): what one pair of runs says, no more.
    """
    a, b = np.array(values(ours, value)), np.array(values(theirs, value))
    if not a.size or not b.size:
        return math.nan, fits.UNKNOWN
    apart = float(a.mean() - b.mean())
    if min(a.size, b.size) < 2:
        return apart, (apart, apart)
    rng = np.random.default_rng(0)
    drawn = [side[rng.integers(side.size, size=(fits.RESAMPLES, side.size))].mean(axis=1) for side in (a, b)]
    return apart, fits.interval_of(drawn[0] - drawn[1])


def signed(apart: float, interval: tuple[float, float], digits: int = 3) -> str:
    """ "+0.120 (+0.100 to +0.140)"."""
    if math.isnan(apart):
        return "not measured"
    low, high = interval
    if low == high:
        return f"{apart:+.{digits}f} (one seed on a side)"
    return f"{apart:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"

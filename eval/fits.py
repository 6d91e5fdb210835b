"""Laws fitted to a few measured points, and how sure one can be of them: bootstrap over the points.

An interval is the percentile interval of the estimates from points drawn anew with replacement; draws that
cannot determine the law (too few different x) are left out. With no more points than a law has parameters it
passes through all of them: R2 and intervals are nan, since nothing was tested.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
RESAMPLES = 1000
GROWTH = np.geomspace(1e-2, 20.0, 200)  # k (max x - min x) of the exponentials that are tried first

Points = Float[np.ndarray, " n"]
Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law with its parameters by name.

    Attributes:
        intervals: of each parameter, at `CONFIDENCE`.
        r2: share of the variance of y that the law explains, at most 1.
        points: how many were fitted.
    """

    law: str
    parameters: Mapping[str, float]
    intervals: Mapping[str, Interval]
    r2: float
    points: int

    def __call__(self, x: Any) -> Any:
        """y of the law at ``x``, a number or an array."""
        return LAWS[self.law].value(np.asarray(x, np.float64), *self.parameters.values())


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with its interval."""

    value: float
    interval: Interval
    points: int


@dataclasses.dataclass(frozen=True)
class Law:
    """Parameter names, least squares of them, and y as a function of x and of them."""

    names: Sequence[str]
    solve: Callable[[Points, Points], tuple[float, ...]]
    value: Callable[..., Any]


def linear(x: ArrayLike, y: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """``y = a x + b`` by least squares. Raises ValueError for fewer than two different x."""
    return _fit("a x + b", x, y, resamples, seed)


def exponential(x: ArrayLike, y: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """``y = a (c^x - 1) + b`` with c > 1 by least squares, the law of arXiv:2410.07145 for recall.

    For a given c it is linear in a and b, so only c is searched: on a grid, then between its neighbours. Data
    on a straight line have no best c; it goes to the lower end of the grid.

    Raises:
        ValueError: for fewer than three different x.
    """
    return _fit("a (c^x - 1) + b", x, y, resamples, seed)


def spearman(x: ArrayLike, y: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Correlation:
    """Rank correlation; nan where one of them is constant.

    Raises:
        ValueError: for fewer than three points, or a number that is not finite.
    """
    x, y = _points(x, y, 1)
    if x.size < 3:
        raise ValueError(f"a rank correlation needs at least 3 points, found {x.size}")
    estimates = [_spearman(x[drawn], y[drawn]) for drawn in _draws(x, 2, resamples, seed)]
    return Correlation(_spearman(x, y), interval_of(estimates), x.size)


def r_squared(y: ArrayLike, predicted: ArrayLike) -> float:
    """1 - residual / total sum of squares; nan where y is constant."""
    y, predicted = np.asarray(y, np.float64), np.asarray(predicted, np.float64)
    total = np.sum((y - y.mean()) ** 2)
    return float(1 - np.sum((y - predicted) ** 2) / total) if total > 0 else math.nan


def mean_interval(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Of the mean over ``values`` (seeds), drawn anew; nan for fewer than two."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        return UNKNOWN
    drawn = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    return interval_of(values[drawn].mean(axis=1))


def interval_of(estimates: ArrayLike) -> Interval:
    """The middle `CONFIDENCE` of them; nan without a finite one."""
    found = np.asarray(estimates, np.float64)
    found = found[np.isfinite(found)]
    if not found.size:
        return UNKNOWN
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(found, [tail, 100 - tail])
    return float(low), float(high)


def _fit(name: str, x: ArrayLike, y: ArrayLike, resamples: int, seed: int) -> Fit:
    law = LAWS[name]
    x, y = _points(x, y, len(law.names))
    found = law.solve(x, y)
    intervals, r2 = dict.fromkeys(law.names, UNKNOWN), math.nan
    if x.size > len(law.names):
        r2 = r_squared(y, law.value(x, *found))
        drawn = _draws(x, len(law.names), resamples, seed)
        estimates = np.array([law.solve(x[i], y[i]) for i in drawn]).reshape(-1, len(law.names))
        intervals = {name: interval_of(column) for name, column in zip(law.names, estimates.T)}
    return Fit(name, dict(zip(law.names, map(float, found))), intervals, r2, x.size)


def _points(x: ArrayLike, y: ArrayLike, different: int) -> tuple[Points, Points]:
    """As float64 arrays. Raises ValueError for what cannot be fitted."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"x and y should be as many numbers, found shapes {x.shape} and {y.shape}")
    bad = ~(np.isfinite(x) & np.isfinite(y))
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(f"point {i} is ({x[i]}, {y[i]}); leave out what is not finite")
    if np.unique(x).size < different:
        raise ValueError(f"the law needs {different} different x, found {np.unique(x).size}")
    return x, y


def _draws(x: Points, different: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for drawn in rng.integers(x.size, size=(resamples, x.size)):
        if np.unique(x[drawn]).size >= different:
            yield drawn


def _spearman(x: Points, y: Points) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(scipy.stats.rankdata(x), scipy.stats.rankdata(y))[0, 1])


def _solve_linear(x: Points, y: Points) -> tuple[float, float]:
    a = np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2)
    return a, y.mean() - a * x.mean()


def _solve_exponential(x: Points, y: Points) -> tuple[float, float, float]:
    """In units of the range of x, as ``a' (e^(k u) - 1) + b'`` with u from 0 to 1."""
    start, span = x.min(), np.ptp(x)
    u = (x - start) / span

    def residual(k: Any) -> Any:
        """Of the best a' and b' for each k."""
        basis = np.expm1(np.multiply.outer(k, u))
        basis -= basis.mean(axis=-1, keepdims=True)
        explained = (basis @ (y - y.mean())) ** 2 / np.sum(basis**2, axis=-1)
        return np.sum((y - y.mean()) ** 2) - explained

    best = int(np.argmin(residual(GROWTH)))
    bounds = GROWTH[max(best - 1, 0)], GROWTH[min(best + 1, len(GROWTH) - 1)]
    k = scipy.optimize.minimize_scalar(residual, bounds=bounds, method="bounded").x
    a, b = _solve_linear(np.expm1(k * u), y)
    # a' (e^(k u) - 1) + b' = a (c^x - 1) + b, with c^x = e^(k u) c^start.
    c = math.exp(k / span)
    scaled = a * math.exp(-k * start / span)
    return scaled, c, b + scaled - a


LAWS = {
    "a x + b": Law(("a", "b"), _solve_linear, lambda x, a, b: a * x + b),
    "a (c^x - 1) + b": Law(
        ("a", "c", "b"), _solve_exponential, lambda x, a, c, b: a * np.expm1(x * math.log(c)) + b
    ),
}

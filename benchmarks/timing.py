"""Wall time of a call: compilation apart from steady state, samples long enough for the clock, medians."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        first: of the first call, compilation included.
        samples: of the calls after it, in the order they were taken.
    """

    first: float
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def compile(self) -> float:
        """What the first call took longer: compilation, and whatever else a program does once."""
        return max(0.0, self.first - self.median)

    @property
    def best(self) -> float:
        return min(self.samples)


class Stopwatch:
    """Times ``call``, waiting for the arrays it returns; a sample is the mean of enough calls in a row.

    Args:
        call: does the work once. Arrays of jax in its result are waited for.
        min_seconds: length of a sample; a call that takes longer is timed alone.
        now: gives seconds; replaced in tests.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        min_seconds: float = 0.2,
        now: Callable[[], float] = time.perf_counter,
    ):
        self._call, self._min_seconds, self._now = call, min_seconds, now
        self._calls = 1

    def warm_up(self) -> float:
        """Seconds of the first call; a second one, untimed to the outside, sets the length of a sample."""
        first = self._run(1)
        self._calls = max(1, math.ceil(self._min_seconds / max(self._run(1), 1e-9)))
        return first

    def sample(self) -> float:
        """Seconds per call, over one sample."""
        return self._run(self._calls)

    def _run(self, calls: int) -> float:
        start = self._now()
        for _ in range(calls):
            jax.block_until_ready(self._call())
        return (self._now() - start) / calls


def measure(call: Callable[[], Any], repeats: int, min_seconds: float = 0.2) -> Timing:
    """``repeats`` samples of ``call`` after its warm-up."""
    watch = Stopwatch(call, min_seconds)
    first = watch.warm_up()
    return Timing(first, tuple(watch.sample() for _ in range(repeats)))

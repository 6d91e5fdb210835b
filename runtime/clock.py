"""Where the time of a run goes, how fast it trains, and how close that is to the hardware's limit."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

OVERHEAD = frozenset({"compile", "eval", "checkpoint"})  # not part of the training speed

# Dense bfloat16 matmul peaks of one device, FLOP/s, from the makers' data sheets; by a part of the device
# kind in lower case, the more particular first. TPU v5e and v6e call themselves "lite", v5p plain "v5".
PEAKS: dict[str, float] = {
    "h200": 989e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "a100": 312e12,
    "tpu v6": 918e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v4": 275e12,
}


class Clock:
    """Attributes wall time to named activities and measures the training speed over a recent window.

    >>> with clock.measure("data"):
    ...     step, batch = next(feed)

    Activities used by the loop: "compile", "data", "step", "eval", "checkpoint"; what lies outside any is
    "other". Inside another, an activity's time counts for the inner one only. Not for use across threads.
    """

    def __init__(self, window: int = 100, now: Callable[[], float] = time.perf_counter):
        """
        Args:
            window: number of ``count`` calls the speed is taken over.
            now: gives seconds; replaced in tests.
        """
        self._now = now
        self._start = now()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._open: list[str] = []
        self._mark = self._start  # when the innermost open activity was last accounted for
        self._points: collections.deque[tuple[float, int, float]] = collections.deque(maxlen=window + 1)
        self._steps, self._tokens = 0, 0.0

    @contextlib.contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Attributes the time inside to ``activity``."""
        self._account()
        self._open.append(activity)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    def count(self, tokens: int | float = 0, steps: int = 1) -> None:
        """Notes that ``steps`` more updates over ``tokens`` tokens are done."""
        self._account()
        if not self._points:
            # The first step came with the compilation, outside the window.
            self._points.append((self._productive(), steps, tokens))
            self._steps, self._tokens = steps, tokens
            return
        self._steps += steps
        self._tokens += tokens
        self._points.append((self._productive(), self._steps, self._tokens))

    def tokens_per_second(self) -> float | None:
        """Over the window, without time spent on compilation, evaluation and checkpoints; None at first."""
        return self._rate(2)

    def steps_per_second(self) -> float | None:
        """As :meth:`tokens_per_second`, of updates."""
        return self._rate(1)

    def eta(self, remaining_steps: int) -> float | None:
        """Seconds that ``remaining_steps`` updates take at the present speed; None while it is unknown."""
        rate = self.steps_per_second()
        return remaining_steps / rate if rate else None

    def seconds(self) -> dict[str, float]:
        """Seconds by activity so far, with "other" and "total"."""
        self._account()
        total = self._mark - self._start
        named = {name: seconds for name, seconds in self._seconds.items() if name != "other"}
        return {**named, "other": total - sum(named.values()), "total": total}

    def _account(self) -> None:
        now = self._now()
        self._seconds[self._open[-1] if self._open else "other"] += now - self._mark
        self._mark = now

    def _productive(self) -> float:
        return self._mark - self._start - sum(self._seconds.get(name, 0.0) for name in OVERHEAD)

    def _rate(self, column: int) -> float | None:
        if len(self._points) < 2:
            return None
        first, last = self._points[0], self._points[-1]
        elapsed = last[0] - first[0]
        return (last[column] - first[column]) / elapsed if elapsed > 0 else None


def mfu(flops_per_second: int | float | None, devices: int, peak: int | float | None) -> float | None:
    """Model FLOP utilisation, 0 to 1: useful FLOP/s over the peak of ``devices`` devices; None if unknown."""
    return flops_per_second / (devices * peak) if flops_per_second is not None and peak else None


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of one device: dense bfloat16 of a known accelerator, None of an unknown one.

    Of a CPU: its share of the float32 matmul rate measured here (a fraction of a second, once a process),
    since several devices may stand for one machine.
    """
    if device.platform == "cpu":
        return measured_cpu_flops() / jax.local_device_count("cpu")
    return accelerator_peak(device.device_kind)


def accelerator_peak(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of an accelerator by its ``device_kind``; None if it is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in kind.lower()), None)


@functools.cache
def measured_cpu_flops(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the best of a few float32 matmuls of ``size`` x ``size`` on this machine's CPU."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.ones((size, size), jnp.float32)
        matmul = jax.jit(jnp.matmul)
        matmul(x, x).block_until_ready()
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            matmul(x, x).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best

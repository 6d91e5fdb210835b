"""Stop cleanly on SIGTERM and SIGINT: the loop asks after each step, saves, and leaves."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """A context in which a signal asks the run to stop, instead of killing it.

    One process: the first SIGTERM or SIGINT is remembered, a second SIGINT interrupts at once. With
    ``jax.distributed`` initialised, jax itself catches SIGTERM, tells the other processes, and names one step
    that all of them will reach; a handler of our own would hide the signal from it. SIGINT is passed on to
    it as SIGTERM. Signals keep their usual effect outside the main thread, where python cannot catch them,
    and without jax's preemption service, where processes could not agree.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._agree = jax.distributed.is_initialized() and getattr(
            jax.config, "jax_enable_preemption_service", False
        )

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            if not jax.distributed.is_initialized():
                self._previous = {s: signal.signal(s, self._remember) for s in SIGNALS}
            elif self._agree:
                self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, self._remember)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def should_stop(self, step: int) -> bool:
        """Whether to save and leave after ``step``. Call it once a step, on every process: all agree."""
        if self._agree:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received is not None

    @property
    def reason(self) -> str:
        """Name of the signal that this process received, or that another one told of."""
        return self._received.name if self._received is not None else "preemption notice"

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
        if self._agree:
            os.kill(os.getpid(), signal.SIGTERM)

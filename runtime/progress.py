"""What a person sees of a run: one live line in a terminal, now and then a plain line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

FIRST_GAP, LONGEST_GAP = 5.0, 60.0  # seconds between plain lines: grows from the first to the second


class Progress:
    """Step, loss, bits per byte, speed, MFU and time left, on process 0. Close it, or use it as a context."""

    def __init__(
        self,
        total_steps: int,
        *,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            total_steps: the step the run ends at.
            console: where to; stdout if None.
            now: gives seconds; replaced in tests.
        """
        self._total = total_steps
        self._console = console or Console(soft_wrap=True)
        self._shown = jax.process_index() == 0
        self._now = now
        self._gap = FIRST_GAP
        self._printed: float | None = None
        self._last: tuple[int, str] | None = None
        self._live: Live | None = None
        if self._shown and self._console.is_terminal:
            self._live = Live(Text(""), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows ``values`` of ``step``: any of loss, bpb, tokens_per_second, mfu, eta (seconds)."""
        if not self._shown:
            return
        line = progress_line(step, self._total, values)
        self._last = (step, line)
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
            return
        now = self._now()
        if self._printed is None or now - self._printed >= self._gap:
            if self._printed is not None:
                self._gap = min(2 * self._gap, LONGEST_GAP)
            self._print(line)
            self._printed = now

    def note(self, text: str) -> None:
        """A line that stays, such as an evaluation's result; above the live line."""
        if self._shown:
            self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leaves the last state as a plain line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._last is not None:
            self._print(self._last[1])

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)
        self._last = None


def progress_line(step: int, total: int, values: Mapping[str, Any]) -> str:
    """One line such as ``step 120/1000  loss 2.3456  bpb 1.692  12.3k tok/s  mfu 41.0%  eta 0:03:20``."""
    parts = [f"step {step}/{total}"]
    formats: dict[str, Callable[[float], str]] = {
        "loss": lambda x: f"loss {x:.4f}",
        "bpb": lambda x: f"bpb {x:.3f}",
        "tokens_per_second": lambda x: f"{_si(x)} tok/s",
        "mfu": lambda x: f"mfu {100 * x:.1f}%",
        "eta": lambda x: f"eta {_duration(x)}",
    }
    for name, spell in formats.items():
        if values.get(name) is not None:
            parts.append(spell(float(values[name])))
    return "  ".join(parts)


def _si(x: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= limit:
            return f"{x / limit:.1f}{suffix}"
    return f"{x:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"

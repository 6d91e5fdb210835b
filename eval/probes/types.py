"""The contract of a probe: what it is given, what it returns.

A new probe is one file with a dataclass like :class:`Probe`, and one entry in ``PROBES`` beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from matplotlib.figure import Figure

from eval.opened import OpenRun

Numbers = Sequence[float] | np.ndarray
Say = Callable[[str], None]  # progress, for whoever waits


class NotApplicable(Exception):
    """A probe has nothing to measure on this run; the message says why. Recorded, but no failure."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of one line: ``y`` over ``x``, with the standard error of ``y`` where it is known."""

    x: Numbers
    y: Numbers
    xlabel: str
    ylabel: str
    error: Numbers | None = None


@dataclasses.dataclass(frozen=True)
class Grid:
    """A heat map: ``values`` [row][column], with the names of columns ``x`` and, from the top, of rows ``y``.

    ``low`` and ``high`` are the ends of the shades.
    """

    x: Sequence[str]
    y: Sequence[str]
    values: np.ndarray | Sequence[Sequence[float]]
    xlabel: str
    ylabel: str
    low: float = 0.0
    high: float = 1.0


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        numbers: all of it, as what JSON can hold (numpy arrays and scalars too). Scalars, and flat dicts of
            scalars such as ``{"1x": 2.3, "2x": 2.2}``, are shown in the summary table.
        curves: by the name in the legend.
        arrays: what is too long for JSON, kept as NAME.npz beside it.
        grids: by title.
    """

    numbers: dict[str, Any]
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    grids: dict[str, Grid] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Probe(Protocol):
    """A pure consumer of a run; a frozen dataclass whose fields are its settings, each with a default.

    ``run`` is called on an open run, with its mesh and its matmul precision in force. Whatever it raises is
    recorded in its place, and the other probes go on.
    """

    name: ClassVar[str]

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        """Measure. Raises NotApplicable where this run has nothing to measure."""

    def plot(self, result: ProbeResult) -> Figure | None:
        """The picture of ``result``, a function of it alone; None for none."""

"""bAbI's tasks 1 to 3 with their facts spread in text, as in BABILong (arXiv:2406.10149)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.asked import Asked, check, curves, measure
from eval.probes.plot import plot_curves
from eval.probes.types import ProbeResult, Say
from tasks.haystack import babi

TOKENS = 20  # that may be said


@dataclasses.dataclass(frozen=True)
class Babi:
    """Where is someone, where is something, where was it before: places that follow from one to three facts.

    ``score`` is BABILong's: the place stands in what greedy decoding says before the first full stop.
    ``tokens_right`` is the share of the answer's tokens that are the most likely, those before them given.
    ``chance`` is that of one of the six places.

    Attributes:
        tasks: "qa1", "qa2", "qa3".
        factors: prompt lengths, in training lengths; a task with no room is left out of a length.
        samples: prompts of each task and length.
        noise: "text" of the run's validation side, or "sentences" made by rule ("own" is the same).
        rows: prompts read at a time.
        seed: of all that is drawn.
    """

    name: ClassVar[str] = "babi"
    tasks: tuple[str, ...] = tuple(babi.FACTS)
    factors: tuple[float, ...] = (4.0, 8.0)
    samples: int = 8
    noise: str = "text"
    rows: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.name, self._asked, list(babi.FACTS))

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        numbers = measure(opened, self._asked, lambda said, references: babi.is_right(said, *references), say)
        return ProbeResult({**numbers, **numbers["score"], "chance": babi.CHANCE}, curves(numbers))

    def plot(self, result: ProbeResult) -> Figure:
        marks = {"training length": result.numbers["training_length"]}
        return plot_curves(result.curves, "bAbI in text", marks=marks)

    @property
    def _asked(self) -> Asked:
        tokens = dict.fromkeys(self.tasks, TOKENS)
        return Asked(tokens, self.factors, self.samples, self.noise, self.rows, self.seed)

"""RULER's tasks at small sizes (arXiv:2404.06654): needles, variable tracking, common and frequent words."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.asked import Asked, check, curves, means, measure
from eval.probes.plot import plot_curves
from eval.probes.types import ProbeResult, Say
from tasks.haystack import niah

TOKENS = dict.fromkeys(niah.TASKS, 128) | {"vt": 30, "cwe": 120, "fwe": 50}  # that may be said
EFFECTIVE = 0.856  # of Llama-2-7B at 4,096 tokens: what RULER calls a satisfactory mean


@dataclasses.dataclass(frozen=True)
class Needles:
    """RULER's synthetic tasks on keys and values that training never had.

    ``score`` is string_match_all: the share of the references that stand in what greedy decoding says, case
    apart; by chance next to 0. ``tokens_right`` is the share of the answer's tokens that are the most likely,
    those before them given. ``effective_length`` is the longest length whose mean score, and that of all
    shorter ones, is at least 0.856; 0 for none.

    Attributes:
        tasks: of RULER; see `tasks.haystack`.
        factors: prompt lengths, in training lengths; a task with no room is left out of a length.
        samples: prompts of each task and length.
        noise: of the haystacks that are essays: "text" of the run's validation side, or "sentences" made by
            rule ("own" is the same). All others are as published.
        rows: prompts read at a time.
        seed: of all that is drawn.
    """

    name: ClassVar[str] = "needles"
    tasks: tuple[str, ...] = tuple(TOKENS)
    factors: tuple[float, ...] = (2.0, 4.0)
    samples: int = 4
    noise: str = "text"
    rows: int = 22
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.name, self._asked, list(TOKENS))

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        numbers = measure(opened, self._asked, string_match_all, say)
        score, right = numbers["score"], numbers["tokens_right"]
        numbers["mean_score"] = means(score, numbers["lengths"])
        numbers["mean_tokens_right"] = means(right, numbers["lengths"])
        numbers["effective_length"] = 0
        for name, mean in numbers["mean_score"].items():
            if mean < EFFECTIVE:
                break
            numbers["effective_length"] = numbers["lengths"][name]
        return ProbeResult(numbers, curves(numbers))

    def plot(self, result: ProbeResult) -> Figure:
        marks = {"training length": result.numbers["training_length"]}
        return plot_curves(result.curves, "RULER's tasks", marks=marks)

    @property
    def _asked(self) -> Asked:
        tokens = {task: TOKENS.get(task, 0) for task in self.tasks}
        return Asked(tokens, self.factors, self.samples, self.noise, self.rows, self.seed)


def string_match_all(said: str, references: tuple[str, ...]) -> float:
    """Share of ``references`` that stand in ``said``, whatever the case."""
    return sum(reference.lower() in said.lower() for reference in references) / len(references)

"""Loss against how much of its text the model has seen: does it use a long context, does it survive one?"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.plot import plot_curves
from eval.probes.scoring import (
    UNITS,
    Scores,
    by_group,
    long_rows,
    means,
    paired_difference,
    rows_available,
    score,
    task_of,
)
from eval.probes.sliding import sliding_scores
from eval.probes.types import Curve, ProbeResult, Say
from tasks.lm import LMTask

PROTOCOL = "position curve (arXiv:2410.07145)"


@dataclasses.dataclass(frozen=True)
class LossByPosition:
    """Mean loss in bins of the context length: how many tokens, the one just read included, a target is
    predicted from.

    The position curve of Stuffed Mamba, but that every target is scored and no bin is dropped. Three curves:

    * ``long_documents``: the same documents in every bin, each read alone from its start with the state
      carried, beyond the training length as far as enough documents reach ("stream" packing: rows of the
      stream).
    * ``truncated_to_1x``: its control beyond the training length T, targets of some of the same documents
      predicted from between T / 2 and T tokens. ``beyond_1x`` is the mean over these targets with the state
      carried and truncated, and their difference, paired by document, with its standard error.
    * ``validation_rows``: the validation batches as packed, whose mean over all bins is the validation loss.

    Attributes:
        bins_per_doubling: bins from one context length to its double.
        factor: length of the long documents in training lengths; halved until there are enough of them.
        documents, min_documents: how many of them are read at most, and how many are enough.
        control_documents: how many of them also with a truncated context; 0 for no control.
    """

    name: ClassVar[str] = "loss_by_position"
    bins_per_doubling: int = 2
    factor: float = 8.0
    documents: int = 64
    min_documents: int = 8
    control_documents: int = 16

    def __post_init__(self) -> None:
        ranges = {
            "bins_per_doubling": (self.bins_per_doubling >= 1, "at least 1"),
            "factor": (self.factor > 0, "positive"),
            "documents": (self.documents >= self.min_documents, "at least min_documents"),
            "min_documents": (self.min_documents >= 1, "at least 1"),
            "control_documents": (self.control_documents >= 0, "at least 0"),
        }
        for field, (fits, wanted) in ranges.items():
            if not fits:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)} should be {wanted}")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        task, trained = task_of(opened), opened.config.task.seq_len
        numbers: dict[str, Any] = {"protocol": PROTOCOL, "training_length": trained}
        sums: dict[str, Scores] = {}
        wanted = round(self.factor * trained)
        length = self._length(opened, task, wanted)
        room = max(length, task.eval_shape[1])
        lengths = {"long_documents": length, "truncated_to_1x": length, "validation_rows": task.eval_shape[1]}
        if length < wanted:
            count = rows_available(task, wanted, from_start=True)
            numbers["shortened"] = (
                f"from {wanted} to {length} targets: so long are {count} validation documents "
                f"({self.min_documents} needed), model.max_positions={opened.config.model.longest}"
            )
            say(numbers["shortened"])
        if length:
            rows = long_rows(task, length, self.documents, from_start=True)
            numbers |= {"documents": len(rows["tokens"]), "document_length": length}
            say(f"{len(rows['tokens'])} documents of {length} targets")
            carried = score(opened, task, rows, room)
            sums["long_documents"] = self._sums(carried, rows["segment_ids"])
            if self.control_documents and length > trained > 1:
                rows, carried = jax.tree.map(lambda a: a[: self.control_documents], (rows, carried))
                say(f"{len(rows['tokens'])} of them, context truncated to {trained} tokens")
                truncated = sliding_scores(opened, task, rows, trained, trained // 2, room)
                late = contexts(rows["segment_ids"]) > trained
                carried, truncated = jax.tree.map(lambda a: np.where(late, a, 0.0), (carried, truncated))
                sums["truncated_to_1x"] = self._sums(truncated, rows["segment_ids"])
                numbers["beyond_1x"] = _beyond(carried, truncated)
        validation = task.eval_sets()["validation"]
        say(f"{len(validation)} validation batches")
        parts = [self._sums(score(opened, task, batch, room), batch["segment_ids"]) for batch in validation]
        sums["validation_rows"] = jax.tree.map(lambda *part: np.sum(part, axis=0), *parts)

        curves, bins = {}, {}
        for name, scores in sums.items():
            if name != "truncated_to_1x":  # which has not all targets
                numbers[name] = means(jax.tree.map(np.sum, scores))
            bins[name] = _table(scores, self._ends(lengths[name]))
            metric = next(metric for metric in UNITS if metric in scores)
            x, y = bins[name]["context"], bins[name][metric]
            curves[name.replace("_", " ")] = Curve(x, y, "tokens of context", UNITS[metric])
        return ProbeResult(numbers | {"bins": bins}, curves)

    def plot(self, result: ProbeResult) -> Figure:
        marks = {"training length": result.numbers["training_length"]}
        return plot_curves(result.curves, "Loss by position", marks=marks)

    def _length(self, opened: OpenRun, task: LMTask, wanted: int) -> int:
        """``wanted``, halved until enough documents and the model reach so far; 0 where they never do."""
        limit = opened.config.model.longest or wanted
        while wanted and (
            wanted > limit or rows_available(task, wanted, from_start=True) < self.min_documents
        ):
            wanted //= 2
        return wanted

    def _ends(self, longest: int) -> Int[np.ndarray, " n"]:
        """The longest context in each bin: with two bins a doubling 1, 2, 4, 5, 8, 11, 16, 22, 32, ..."""
        powers = np.arange(math.ceil(math.log2(longest) * self.bins_per_doubling) + 1)
        return np.unique(np.minimum(2.0 ** (powers / self.bins_per_doubling), longest).astype(np.int64))

    def _sums(self, scores: Scores, segment_ids: Int[np.ndarray, "B L"]) -> Scores:
        """Sums and weights in each bin."""
        ends = self._ends(segment_ids.shape[1])
        return by_group(scores, np.searchsorted(ends, contexts(segment_ids)), len(ends))


def _table(scores: Scores, ends: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """Columns of the bins that hold any target: contexts "from" and "to", "tokens", and the mean metrics."""
    begins = np.concatenate([[1], ends[:-1] + 1])
    tokens = scores["loss"][1]
    columns = {
        "from": begins,
        "to": ends,
        "context": np.sqrt(begins * ends),
        "tokens": tokens,
        **means(scores),
    }
    return {name: column[tokens > 0] for name, column in columns.items()}


def _beyond(carried: Scores, truncated: Scores) -> dict[str, Any]:
    """Means over the same targets, and the difference with its standard error over rows."""
    metric = next(metric for metric in UNITS if metric in carried)
    rows = [tuple(a.sum(axis=1, dtype=np.float64) for a in scores[metric]) for scores in (carried, truncated)]
    mean, error = paired_difference(*rows)
    return {
        **{name: a.sum() / b.sum() for name, (a, b) in zip(("carried", "truncated_to_1x"), rows)},
        "difference": mean,
        "standard_error": error,
    }


def contexts(segment_ids: Int[np.ndarray, "B L"]) -> Int[np.ndarray, "B L"]:
    """How many tokens of its own segment each target is predicted from."""
    index = np.arange(segment_ids.shape[1])
    begins = np.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - np.maximum.accumulate(np.where(begins, index, 0), axis=1) + 1

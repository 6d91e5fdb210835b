"""Loss at the end of rows shorter and longer than those of training: does more context help, or break?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.plot import plot_curves
from eval.probes.scoring import UNITS, long_rows, means, paired_difference, rows_available, score, task_of
from eval.probes.sliding import PROTOCOL as SLIDING
from eval.probes.sliding import sliding_scores
from eval.probes.types import Curve, NotApplicable, ProbeResult, Say
from tasks.lm import LMTask
from tasks.types import Batch

PROTOCOL = "last-k at window (arXiv:2406.14528)"


@dataclasses.dataclass(frozen=True)
class LengthExtrapolation:
    """The same validation targets, predicted from ever longer contexts.

    Two protocols. DeciMamba's, last-k at window: rows of W tokens begin from an empty state at position 0,
    and the mean is over their last k targets; k is half of the shortest W. Here rows end at the same places
    for every W = factor x training length. So W = 1x is also the control of the longer ones: their targets,
    from a context truncated to the training length. ``above_1x`` is the distance to it, paired row by row,
    with its standard error over rows. ``whole_row`` is the mean over all targets of the rows: more at longer
    W.

    Sliding window: longer rows are read in windows of W >= 1x that overlap by half, and every target is
    scored once, in the first window that it is in. Again W = 1x is the truncated context. (The third protocol
    is the probe ``loss_by_position``.)

    Attributes:
        factors: row lengths, in training lengths.
        rows, min_rows: how many rows are taken at most, and how many are enough; a longer W has fewer.
        sliding_factor: length of the rows of sliding windows, in training lengths; 0 for none of these.
        sliding_rows: how many of them at most.
    """

    name: ClassVar[str] = "length_extrapolation"
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    rows: int = 64
    min_rows: int = 8
    sliding_factor: float = 4.0
    sliding_rows: int = 16

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"{self.name}.factors={self.factors} should be positive, and at least one")
        if not 1 <= self.min_rows <= self.rows:
            raise ValueError(f"{self.name}.min_rows={self.min_rows} should lie in 1..rows={self.rows}")
        if self.sliding_factor < 0 or self.sliding_rows < 1:
            raise ValueError(
                f"{self.name}.sliding_factor >= 0 and sliding_rows >= 1 are expected, got {self}"
            )

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        task, trained = task_of(opened), opened.config.task.seq_len
        lengths, left_out = self._lengths(opened, task)
        for name, reason in left_out.items():
            say(f"{name} left out: {reason}")
        longest = max(lengths.values())
        texts = long_rows(task, longest, self.rows)
        count, last = len(texts["tokens"]), max(min(lengths.values()) // 2, 1)
        end, whole = {}, {}
        for name, length in lengths.items():
            say(f"{name}: {count} rows of {length} targets")
            scores = score(opened, task, _last_part(texts, length), longest)
            end[name] = jax.tree.map(lambda a: a[:, -last:].sum(axis=1, dtype=np.float64), scores)
            whole[name] = means(jax.tree.map(lambda a: a.sum(dtype=np.float64), scores))
        metric = next(metric for metric in UNITS if metric in end["1x"])
        above = {name: paired_difference(rows[metric], end["1x"][metric]) for name, rows in end.items()}
        numbers: dict[str, Any] = {
            "protocol": PROTOCOL,
            "training_length": trained,
            "rows": count,
            "targets_per_row": last,
            "lengths": lengths,
            "left_out": left_out,
            **_by_metric({name: means(jax.tree.map(np.sum, rows)) for name, rows in end.items()}),
            **{f"{name}_whole_row": values for name, values in _by_metric(whole).items()},
            f"{metric}_above_1x": {name: mean for name, (mean, _) in above.items()},
            f"{metric}_above_1x_standard_error": {name: error for name, (_, error) in above.items()},
        }
        numbers |= self._sliding(opened, task, lengths, metric, say)
        return ProbeResult(numbers, _curves(numbers, metric))

    def plot(self, result: ProbeResult) -> Figure:
        marks = {"training length": result.numbers["training_length"]}
        return plot_curves(result.curves, "Length extrapolation", marks=marks)

    def _sliding(
        self, opened: OpenRun, task: LMTask, lengths: Mapping[str, int], metric: str, say: Say
    ) -> dict[str, Any]:
        """The second protocol, as far as ``lengths`` fit into its rows; nothing where only one does."""
        whole = round(self.sliding_factor * lengths["1x"])
        windows = {name: n for name, n in lengths.items() if lengths["1x"] <= n <= whole}
        texts = long_rows(task, whole, self.sliding_rows) if len(windows) > 1 else {"tokens": np.zeros(0)}
        if len(texts["tokens"]) < min(self.min_rows, self.sliding_rows):
            return {}
        found = {}
        for name, window in windows.items():
            say(f"sliding window of {name}: {len(texts['tokens'])} rows of {whole} targets")
            scores = sliding_scores(opened, task, texts, window, max(window // 2, 1), max(lengths.values()))
            found[name] = jax.tree.map(lambda a: a.sum(axis=1, dtype=np.float64), scores)[metric]
        above = {name: paired_difference(rows, found["1x"]) for name, rows in found.items()}
        return {
            "sliding_window_protocol": SLIDING,
            "sliding_window_rows": len(texts["tokens"]),
            "sliding_window_row_length": whole,
            f"{metric}_sliding_window": {name: a.sum() / b.sum() for name, (a, b) in found.items()},
            f"{metric}_sliding_window_above_1x": {name: mean for name, (mean, _) in above.items()},
            f"{metric}_sliding_window_above_1x_standard_error": {n: error for n, (_, error) in above.items()},
        }

    def _lengths(self, opened: OpenRun, task: LMTask) -> tuple[dict[str, int], dict[str, str]]:
        """Row lengths by name, ascending, as far as they can be measured, and why the rest cannot.

        Raises NotApplicable if 1x, with which all others are compared, cannot.
        """
        trained, limit = opened.config.task.seq_len, opened.config.model.longest
        lengths: dict[str, int] = {}
        left_out: dict[str, str] = {}
        for factor in sorted({1.0, *self.factors}):
            name, length = f"{factor:g}x", round(factor * trained)
            found = rows_available(task, length) if length >= 2 else 0
            if length < 2:
                left_out[name] = f"{length} tokens leave nothing to predict from"
            elif limit is not None and length > limit:
                left_out[name] = f"{length} tokens, model.max_positions={limit}"
            elif found < self.min_rows:
                left_out[name] = f"{found} validation texts of {length} targets, {self.min_rows} needed"
            else:
                lengths[name] = length
        if "1x" not in lengths:
            raise NotApplicable(f"nothing to compare with, 1x is left out: {left_out['1x']}")
        return lengths, left_out


def _last_part(rows: Batch, length: int) -> Batch:
    """The last ``length`` targets of each row, as rows that begin there."""
    part = {name: array[:, -length:] for name, array in rows.items()}
    return {**part, "positions": rows["positions"][:, :length]}


def _by_metric(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{length: {metric: value}} turned inside out."""
    metrics = next(iter(values.values()))
    return {metric: {name: value[metric] for name, value in values.items()} for metric in metrics}


def _curves(numbers: Mapping[str, Any], metric: str) -> dict[str, Curve]:
    names, trained = list(numbers["lengths"]), numbers["training_length"]

    def curve(values: Mapping[str, float], label: str = UNITS[metric], **rest: Any) -> Curve:
        return Curve(
            [numbers["lengths"][n] for n in values], list(values.values()), "row length", label, **rest
        )

    longer = [name for name in names if numbers["lengths"][name] >= trained]
    sliding = numbers.get(f"{metric}_sliding_window")
    more = {} if sliding is None else {"sliding windows of that length": curve(sliding)}
    return {
        f"last {numbers['targets_per_row']} targets": curve(numbers[metric]),
        "the same, context truncated to 1x": curve(dict.fromkeys(longer, numbers[metric]["1x"])),
        "whole rows": curve(numbers[f"{metric}_whole_row"]),
        **more,
        "last targets less those at 1x": curve(
            numbers[f"{metric}_above_1x"],
            f"{UNITS[metric]} above 1x",
            error=list(numbers[f"{metric}_above_1x_standard_error"].values()),
        ),
    }

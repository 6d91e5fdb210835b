"""Scores of long rows that are read in overlapping windows, each from an empty state."""

from __future__ import annotations

import jax
import numpy as np

from eval.opened import OpenRun
from eval.probes.scoring import Scores, score
from tasks.lm import LMTask
from tasks.types import Batch

PROTOCOL = "sliding window (strided perplexity of fixed-length models; arXiv:2309.12307)"


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where the windows of a row of ``length`` begin; the last ends with the row.

    Raises:
        ValueError: a window longer than the row, or a stride that would leave targets out.
    """
    if not 0 < stride <= window <= length:
        raise ValueError(
            f"sliding window: expected 0 < stride {stride} <= window {window} <= length {length}"
        )
    regular = list(range(0, length - window + 1, stride))
    return regular if regular[-1] == length - window else [*regular, length - window]


def sliding_scores(opened: OpenRun, task: LMTask, rows: Batch, window: int, stride: int, room: int) -> Scores:
    """Every metric at every target of ``rows`` [n, L], each scored in the first window that it is in.

    A target after the first window is predicted from more than ``window - stride`` and at most ``window``
    tokens. With the training length as the window this is what a model gets out of a truncated context.

    Args:
        room: as for `eval.probes.scoring.score`.
    """
    count, length = rows["tokens"].shape
    begins = window_starts(length, window, stride)
    cut = {name: np.concatenate([a[:, b : b + window] for b in begins]) for name, a in rows.items()}
    cut["positions"] = np.broadcast_to(np.arange(window, dtype=np.int32), cut["tokens"].shape)
    new = np.diff(begins, prepend=begins[0] - window)  # targets that no window before has

    def joined(scores: np.ndarray) -> np.ndarray:
        parts = scores.reshape(len(begins), count, window)
        return np.concatenate([part[:, window - n :] for part, n in zip(parts, new)], axis=1)

    return jax.tree.map(joined, score(opened, task, cut, room))

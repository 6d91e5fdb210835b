"""What probes share that look inside a language model, and the prompts that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from eval.opened import OpenRun
from eval.probes.scoring import objective_of_run, running_rows, task_of
from eval.probes.types import NotApplicable
from layers.dynamics import Selective, TimeInvariant
from layers.types import State
from models.lm import LM
from models.walk import is_plain
from tasks.lm import LMTask

FACT = "The capital of France is Paris.\n"
SHOWN = 8  # layers of which curves are drawn


def plain_model(opened: OpenRun) -> LM:
    """The language model of a run, without parameters. Raises NotApplicable for what cannot be walked."""
    model = opened.model.bind(opened.model.shapes)
    if not is_plain(model):
        raise NotApplicable(
            f"it takes a plain decoder apart layer by layer; the run is of kind {opened.config.kind!r} with "
            f"a {type(model).__name__}, or its prompts are decimated"
        )
    return model


def is_recurrent(mixer: Any) -> bool:
    """Whether a mixer carries a state of fixed size whose dynamics it can tell."""
    return mixer.causal and isinstance(mixer, (Selective, TimeInvariant))


def heads_of(state: State) -> Float[Array, "B H _"]:
    """The recurrent state of a mixer, by head; a complex number counts as two."""
    recurrent = state["ssm"] if isinstance(state, Mapping) else state
    return recurrent.reshape(*recurrent.shape[:2], -1)


def trained_length(opened: OpenRun) -> int:
    """Tokens of a training row, of the longest where they differ. Raises NotApplicable if there are none."""
    length = getattr(opened.config.task, "seq_len", None)
    if length is not None:
        return length
    shares = getattr(objective_of_run(opened).task, "length_shares", None)
    if not shares:
        raise NotApplicable(f"it is for rows of tokens, and the run is of kind {opened.config.kind!r}")
    return max(shares)


def reach(opened: OpenRun, length: int) -> int:
    """``length``, or what the model has positions for if that is less."""
    return min(length, opened.config.model.longest or length)


def text_rows(opened: OpenRun, length: int, rows: int) -> Int[np.ndarray, "n L+1"]:
    """Rows of validation documents run together: tokens, and the target after the last.

    Raises NotApplicable for a run that does not read text, or with less text than one row.
    """
    found = running_rows(task_of(opened), length, rows)
    if not len(found["tokens"]):
        raise NotApplicable(f"the validation set has less than one row of {length} targets")
    return np.concatenate([found["tokens"], found["targets"][:, -1:]], axis=1)


def held_out(opened: OpenRun, length: int, rows: int) -> Int[np.ndarray, "n L"]:
    """At most ``rows`` rows of at most ``length`` held-out tokens: of text, or of the task's longest rows.

    Raises NotApplicable for a run with neither.
    """
    task = objective_of_run(opened).task
    if isinstance(task, LMTask):
        return text_rows(opened, length, rows)[:, :-1]
    batches = [data[0] for data in task.eval_sets().values()]
    full = [batch["tokens"][batch["segment_ids"].all(axis=1)] for batch in batches if "tokens" in batch]
    longest = max(full, key=lambda rows: rows.shape[1], default=np.zeros((0, 0), np.int32))[:rows, :length]
    if not longest.size:
        raise NotApplicable(
            f"no rows of tokens without padding are held out by a run of kind {opened.config.kind!r}"
        )
    return longest


def repeated(ids: Int[np.ndarray, " n"], length: int, separator: int) -> Int[np.ndarray, "1 L"]:
    """A document of ``length`` tokens: the separator, then ``ids`` again and again."""
    return np.concatenate([[separator], np.resize(ids, length - 1)])[None]


def spread(names: Sequence[str]) -> list[str]:
    """At most ``SHOWN`` of them, evenly spaced, both ends included."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, SHOWN).round().astype(int))]


def standard_error(rows: np.ndarray) -> np.ndarray:
    """Of the mean over the first axis; NaN for a single row."""
    count = len(rows)
    deviation = rows.std(axis=0, ddof=1) if count > 1 else np.full(rows.shape[1:], np.nan)
    return deviation / np.sqrt(count)

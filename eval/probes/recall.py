"""Recall by the number of things to remember and by the distance to them, beyond the sizes of training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from configs.recall import RecallExperiment
from eval.opened import OpenRun
from eval.probes.plot import plot_curves
from eval.probes.types import Curve, NotApplicable, ProbeResult, Say
from models.functional import Functional
from models.loss import chunked_cross_entropy, chunked_hits
from tasks.recall import RecallTask, RecallTaskConfig, Rows, Size
from tasks.tokenizer import ByteTokenizer

MORE, LONGER = "more items", "longer rows"


@dataclasses.dataclass(frozen=True)
class Recall:
    """Held-out rows of the run's own law; of a language model on bytes, phonebooks of two shots.

    From the largest training size (L tokens, n items) two ways lead on: more items in rows that grow with
    them, (f L, f n), and the same items in longer rows, (f L, n), for each factor f. Accuracy is of single
    answers, with its standard error over rows; exact match of all answers of a row. A phonebook that fills
    the training length is the largest size of a language model.

    Attributes:
        factors: f.
        rows: of each size.
        batch, piece: rows and tokens read at a time, the state carried.
    """

    name: ClassVar[str] = "recall"
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    rows: int = 64
    batch: int = 16
    piece: int = 256

    def __post_init__(self) -> None:
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"{self.name}.factors={self.factors} should be positive, and at least one")
        for field in ("rows", "batch", "piece"):
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)} should be at least 1")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        task, trained = _task_of(opened)
        ways, left_out = self._sizes(task, trained, opened.config.model.longest)
        for name, why in left_out.items():
            say(f"{name} left out: {why}")
        sizes = list(dict.fromkeys(size for way in ways.values() for size in way))
        if not sizes:
            raise NotApplicable(f"no size can be measured: {left_out}")
        room = max(length for length, _ in sizes)
        found = {}
        for size in sizes:
            say(f"{_label(size)}: {self.rows} rows")
            rows = task.held_out(size, np.arange(self.rows))
            found[size] = _scores(rows, *self._read(opened, rows, room))
        numbers: dict[str, Any] = {
            "law": task.config.name,
            "training_size": _label(trained),
            "rows": self.rows,
            "left_out": left_out,
            "chance": {_label(size): task.law.chance(size[1]) for size in sizes},
        }
        for quantity in ("accuracy", "accuracy_standard_error", "exact_match", "loss"):
            numbers[quantity] = {_label(size): found[size][quantity] for size in sizes}
        numbers["by_distance"] = {_label(size): found[size]["by_distance"] for size in sizes}
        return ProbeResult(numbers, _curves(task, ways, found))

    def plot(self, result: ProbeResult) -> Figure:
        return plot_curves(result.curves, f"Recall, {result.numbers['law']}")

    def _sizes(
        self, task: RecallTask, trained: Size, longest: int | None
    ) -> tuple[dict[str, list[Size]], dict[str, str]]:
        """Sizes of each way, ascending, and why others are left out."""
        length, items = trained
        ways: dict[str, list[Size]] = {MORE: [], LONGER: []}
        left_out: dict[str, str] = {}
        for factor in sorted({1.0, *self.factors}):
            for way, many in ((MORE, max(round(factor * items), 1)), (LONGER, items)):
                size = task.law.fitted(round(factor * length), many)
                try:
                    task.law.check(*size)
                except ValueError as error:
                    left_out[_label(size)] = str(error)
                    continue
                if longest is not None and size[0] > longest:
                    left_out[_label(size)] = f"model.max_positions={longest}"
                elif size not in ways[way]:
                    ways[way].append(size)
        return ways, left_out

    def _read(
        self, opened: OpenRun, rows: Rows, room: int
    ) -> tuple[Float[np.ndarray, "n L"], Bool[np.ndarray, "n L"]]:
        """Nats of every target, and whether it is the most likely token."""
        count, length = rows["tokens"].shape
        programs, groups = _programs(opened.model), []
        for first in range(0, count, self.batch):
            state, pieces = programs.start(opened.params, self.batch, room), []
            for begin in range(0, length, self.piece):
                part = {
                    name: _padded(
                        rows[name][first : first + self.batch, begin : begin + self.piece],
                        (self.batch, self.piece),
                    )
                    for name in ("tokens", "targets", "segment_ids", "positions")
                }
                scores, state = programs.read(opened.params, part, state)
                pieces.append(scores)
            groups.append([np.concatenate(p, axis=1) for p in zip(*jax.device_get(pieces))])
        nll, hits = (np.concatenate(group)[:count, :length] for group in zip(*groups))
        return nll, hits


def _task_of(opened: OpenRun) -> tuple[RecallTask, Size]:
    """The law to examine, and the largest size that the run was trained at. Raises NotApplicable."""
    config = opened.config
    if isinstance(config, RecallExperiment):
        task = RecallTask(config.task)
        return task, task.law.fitted(*max(config.task.train_sizes, key=lambda size: size[::-1]))
    if config.kind != "lm" or not isinstance(opened.tokenizer, ByteTokenizer):
        raise NotApplicable("it is for runs of kind 'recall', and language models on bytes")
    least = 3  # two shots and a question
    entries = least
    task = RecallTask(RecallTaskConfig(name="phonebook", train_sizes=((0, least),)))
    while task.law.fitted(0, entries + 1)[0] <= config.task.seq_len:
        entries += 1
    return task, task.law.fitted(0, entries)


def _scores(rows: Rows, nll: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
    """Means over the answers, and accuracy by distance in powers of two."""
    asked = rows["distance"] > 0
    each = (hits & asked).sum(1) / asked.sum(1)
    octave = np.log2(np.maximum(rows["distance"], 1)).astype(int)[asked]
    answers = np.bincount(octave)
    right = np.bincount(octave, hits[asked], len(answers))
    kept = np.flatnonzero(answers)
    return {
        "accuracy": float(hits[asked].mean()),
        "accuracy_standard_error": float(each.std(ddof=1) / np.sqrt(len(each))) if len(each) > 1 else None,
        "exact_match": float((hits | ~asked).all(1).mean()),
        "loss": float(nll[asked].mean()),
        "by_distance": {
            "from": 2**kept,
            "accuracy": right[kept] / answers[kept],
            "answers": answers[kept],
        },
    }


def _curves(
    task: RecallTask, ways: Mapping[str, list[Size]], found: Mapping[Size, Mapping[str, Any]]
) -> dict[str, Curve]:
    curves = {}
    for way, axis, xlabel in ((MORE, 1, "items to remember"), (LONGER, 0, "tokens of a row")):
        sizes = ways[way]
        if len({size[axis] for size in sizes}) < 2:
            continue
        x = [size[axis] for size in sizes]
        errors = [found[size]["accuracy_standard_error"] or 0.0 for size in sizes]
        curves[way] = Curve(x, [found[s]["accuracy"] for s in sizes], xlabel, "accuracy", errors)
        curves[f"{way}, exact match"] = Curve(x, [found[s]["exact_match"] for s in sizes], xlabel, "accuracy")
        chance = [task.law.chance(items) for _, items in sizes]
        curves[f"{way}, chance"] = Curve(x, chance, xlabel, "accuracy")
    for size in dict.fromkeys([*ways[LONGER], *ways[MORE]]):
        at = found[size]["by_distance"]
        middle = np.sqrt(2) * at["from"]
        curves[_label(size)] = Curve(middle, at["accuracy"], "distance in tokens", "accuracy")
    return curves


def _label(size: Size) -> str:
    return "{} in {}".format(*size[::-1])


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Compiled: the state before any token; nats and hits [B, L] of a piece, and the state after it."""

    start: Callable[[Any, int, int], Any]
    read: Callable[[Any, Mapping[str, Any], Any], tuple[tuple[jax.Array, jax.Array], Any]]


@functools.lru_cache(maxsize=1)
def _programs(model: Functional) -> _Programs:
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def start(params: Any, rows: int, room: int) -> Any:
        return model.bind(params).init_state(rows, room)

    @functools.partial(jax.jit, donate_argnums=2)
    def read(params: Any, batch: Mapping[str, Any], state: Any) -> Any:
        lm = model.bind(params)
        hidden, state, _ = lm(
            batch["tokens"], state, segment_ids=batch["segment_ids"], positions=batch["positions"]
        )
        nll, _ = chunked_cross_entropy(lm, hidden, batch["targets"])
        return (nll, chunked_hits(lm, hidden, batch["targets"])), state

    return _Programs(start, read)


def _padded(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Zeros, which are padding, at the ends of both axes."""
    return np.pad(array, [(0, full - size) for full, size in zip(shape, array.shape)])

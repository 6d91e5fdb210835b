"""What validation probes share: the run's task, long rows of held-out text, every target of them scored."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from configs.saved import from_json
from eval.opened import OpenRun
from eval.probes.types import NotApplicable
from models.functional import Functional
from models.loss import token_nll
from objectives import objective_of
from objectives.types import Objective
from tasks.lm import LMTask
from tasks.packing import Layout, Packer
from tasks.types import Batch

Pair = tuple[np.ndarray, np.ndarray]  # sums and weights, of one shape
Scores = dict[str, Pair]  # by metric
UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}  # what to plot, the best known first


def objective_of_run(opened: OpenRun) -> Objective:
    """What the run learned, its data loaded once for all probes. Raises as `objectives.objective_of` does."""
    return _load_objective(opened.config.to_json(), opened.mesh)


def task_of(opened: OpenRun) -> LMTask:
    """The task of a run that models language. Raises NotApplicable for another kind of run."""
    objective = objective_of_run(opened)
    if not isinstance(objective.task, LMTask):
        raise NotApplicable(f"it reads text, and the run is of kind {opened.config.kind!r}")
    return objective.task


@functools.lru_cache(maxsize=1)
def _load_objective(config: str, mesh: jax.sharding.Mesh) -> Objective:
    return objective_of(from_json(config), mesh)


def rows_available(task: LMTask, length: int, *, from_start: bool = False) -> int:
    """How many rows :func:`long_rows` can cut from the validation set."""
    if task.config.packing == "stream":
        return task.validation.targets // length
    pieces = task.validation.lengths // length
    return int(np.minimum(pieces, 1).sum() if from_start else pieces.sum())


def long_rows(task: LMTask, length: int, limit: int, *, from_start: bool = False) -> Batch:
    """At most ``limit`` rows of ``length`` validation targets: a segment each, positions from 0, no padding.

    They do not overlap, lie within one document each, and come from as many documents as possible; but from
    the documents run together for a task packed as "stream". Always the same ones.

    Args:
        from_start: only rows that begin where a document does.
    """
    corpus = task.validation
    if task.config.packing == "stream":
        return running_rows(task, length, limit)
    count = corpus.lengths // length
    count = np.minimum(count, 1) if from_start else count
    document = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    order = np.random.default_rng(0).permutation(len(count))
    chosen = np.lexsort((order[document], number))[:limit]
    start = corpus.starts[document[chosen]] + number[chosen] * length
    index = start[:, None] + np.arange(length)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), index.shape)
    return {
        "tokens": corpus.take(index),
        "targets": corpus.take(index + 1),
        "positions": positions,
        "segment_ids": np.ones_like(positions),
        "weights": np.ones(index.shape, np.float32),
    }


def running_rows(task: LMTask, length: int, limit: int) -> Batch:
    """As :func:`long_rows`, from the documents run together, whatever the task's packing."""
    limit = min(limit, task.validation.targets // length)
    layout = Layout(limit + 1, length, "stream")
    rows = Packer(task.validation, layout, seed=0, once=True).batch(0)
    full = np.flatnonzero(rows["weights"].all(axis=1))[:limit]
    return {name: array[full] for name, array in rows.items()}


def score(opened: OpenRun, task: LMTask, batch: Batch, room: int) -> Scores:
    """Every metric of the task at every target of ``batch`` [n, L]: (sums [n, L], weights [n, L]).

    Rows begin from an empty state. They are read in pieces of the shape of a validation batch with the state
    carried, so that memory does not grow with n, nor with L but for the cache of full attention; and so that
    calls of other L and the same ``room`` are not compiled again.

    Args:
        room: tokens an attention cache has room for, at least L.

    Raises:
        NotApplicable: a model that decimates prompts, and predicts nothing from the tokens it drops.
    """
    if opened.config.model.reads_whole:
        raise NotApplicable(
            "it scores every target, and with model.decimate only the tokens that are kept predict anything"
        )
    count, length = batch["tokens"].shape
    size, piece = task.eval_shape
    shards = opened.mesh.shape["data"] * opened.mesh.shape["fsdp"]
    rows = -(-min(size, count) // shards) * shards
    programs = _programs(opened.model, task)
    groups = []
    for first in range(0, count, rows):
        state, pieces = programs.start(opened.params, rows, room), []
        for begin in range(0, length, piece):
            part = {
                name: _padded(array[first : first + rows, begin : begin + piece], (rows, piece))
                for name, array in batch.items()
            }
            scores, state = programs.read(opened.params, part, state)
            pieces.append(scores)
        groups.append(jax.tree.map(lambda *p: np.concatenate(p, axis=1), *jax.device_get(pieces)))
    return jax.tree.map(lambda *g: np.concatenate(g)[:count, :length], *groups)


def by_group(scores: Scores, groups: Int[np.ndarray, "n L"], count: int) -> Scores:
    """``scores`` [n, L] added up in each of the groups 0..count - 1: (sums [count], weights [count])."""
    return jax.tree.map(lambda a: np.bincount(groups.ravel(), a.ravel(), count), scores)


def paired_difference(rows: Pair, base: Pair) -> tuple[float, float]:
    """Mean of ``rows`` less that of ``base``, which share their weights, and its standard error over rows.

    The ratio estimator's: rows may weigh differently.
    """
    (sums, weights), count = rows, len(rows[0])
    apart = sums - base[0]
    mean = apart.sum() / weights.sum()
    if count < 2:
        return mean, math.nan
    variance = np.sum((apart - mean * weights) ** 2) * count / (count - 1)
    return mean, math.sqrt(variance) / weights.sum()


def means(scores: Scores) -> dict[str, np.ndarray]:
    """sum / weight of every metric; NaN where the weight is zero."""
    return {
        metric: sums / np.where(weights > 0, weights, np.nan) for metric, (sums, weights) in scores.items()
    }


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Compiled functions: the state before any token; the scores [B, L] of a piece and the state after it."""

    start: Callable[[Any, int, int], Any]
    read: Callable[[Any, Batch, Any], tuple[Scores, Any]]


@functools.lru_cache(maxsize=1)
def _programs(model: Functional, task: LMTask) -> _Programs:
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def start(params: Any, rows: int, room: int) -> Any:
        return model.bind(params).init_state(rows, room)

    @functools.partial(jax.jit, donate_argnums=2)
    def read(params: Any, batch: Batch, state: Any) -> Any:
        nll, _, state = token_nll(model.bind(params), batch, state)
        # One target makes a batch of its own: the task's metrics say what it counts for.
        alone = jax.tree.map(lambda a: a.reshape(-1, 1, 1), {"nll": nll, **batch})
        scores = jax.vmap(lambda one: task.metrics({"nll": one["nll"]}, one))(alone)
        return jax.tree.map(lambda a: a.reshape(nll.shape), scores), state

    return _Programs(start, read)


def _padded(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Zeros, which are padding in every field of a batch, at the ends of both axes."""
    return np.pad(array, [(0, full - size) for full, size in zip(shape, array.shape)])

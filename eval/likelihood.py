"""Log-likelihood of continuations, each after its own context; rows of few shapes, read together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from eval.decode import PIECE, RoomError
from eval.opened import OpenRun
from models.functional import Functional
from models.loss import chunked_cross_entropy, chunked_hits

Ids = Int[np.ndarray, " L"]
SHORTEST = 64  # lengths are rounded up to this times a power of two


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        logprob: sum of log-probabilities of its tokens, nats.
        greedy: whether each is the most likely one.
    """

    logprob: float
    greedy: bool


def likelihoods(
    run: OpenRun, pairs: Sequence[tuple[Ids, Ids]], *, rows: int = 8, piece: int = PIECE
) -> list[Likelihood]:
    """Of every continuation after its context, as (context, continuation) of ids.

    Args:
        rows: read at once; rows of like lengths together.
        piece: tokens of a row read at once, the state carried on: bounds the memory of long contexts.

    Raises:
        ValueError: an empty context or continuation.
        RoomError: a pair is longer than the learned positions of the model.
    """
    limit = run.config.model.longest
    for number, (context, continuation) in enumerate(pairs):
        size = len(context) + len(continuation)
        if not len(context) or not len(continuation):
            raise ValueError(f"likelihoods: pair {number} has an empty context or continuation")
        if limit is not None and size - 1 > limit:
            raise RoomError(f"likelihoods: pair {number} has {size} tokens, but model.max_positions={limit}")
    found: dict[int, Likelihood] = {}
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for first in range(0, len(order), rows):
        some = order[first : first + rows]
        group = [np.concatenate(pairs[i]) for i in some]
        group += [group[-1]] * (rows - len(some))  # one shape for all
        nats, hits = _score(run, group, piece)
        for row, i in enumerate(some):
            size = len(pairs[i][1])
            end = len(group[row]) - 1
            asked = slice(end - size, end)
            found[i] = Likelihood(-float(nats[row, asked].sum()), bool(hits[row, asked].all()))
    return [found[i] for i in range(len(pairs))]


def _score(run: OpenRun, group: Sequence[Ids], piece: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats of every next token of every row [B, L], in float64, and whether it is the most likely."""
    config = run.config.model
    length = _rounded(max(map(len, group)) - 1)
    piece = length if config.reads_whole else min(piece, length)
    programs = _programs(run.model)
    state, parts = programs.empty(run.params, len(group), length), []
    for tokens, targets, ids in _pieces(group, length, piece):
        *part, state = programs.read(run.params, tokens, targets, ids, state)
        parts.append(part)
    nats, hits = (np.concatenate(column, axis=1) for column in zip(*jax.device_get(parts)))
    return nats.astype(np.float64), hits


def _rounded(length: int) -> int:
    size = SHORTEST
    while size < length:
        size *= 2
    return size


def _pieces(group: Sequence[Ids], length: int, piece: int) -> Iterator[tuple[np.ndarray, ...]]:
    """(tokens, targets, segment_ids) of ``piece`` columns, right-padded with segment 0."""
    tokens, targets, ids = (np.zeros((len(group), length), np.int32) for _ in range(3))
    for row, whole in enumerate(group):
        size = len(whole) - 1
        tokens[row, :size], targets[row, :size], ids[row, :size] = whole[:-1], whole[1:], 1
    for start in range(0, length, piece):
        part = slice(start, start + piece)
        yield tokens[:, part], targets[:, part], ids[:, part]


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Compiled functions: the state before any token; nats and hits of a piece, and the state after it."""

    empty: Callable[[Any, int, int], Any]
    read: Callable[..., tuple[Array, Array, Any]]


@functools.lru_cache(maxsize=4)
def _programs(model: Functional) -> _Programs:
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def empty(params: Any, rows: int, room: int) -> Any:
        return model.bind(params).init_state(rows, room)

    @functools.partial(jax.jit, donate_argnums=4)
    def read(params: Any, tokens: Array, targets: Array, ids: Array, state: Any) -> Any:
        lm = model.bind(params)
        hidden, state, _ = lm(tokens, state, segment_ids=ids)
        nats, _ = chunked_cross_entropy(lm, hidden, targets)
        return nats, chunked_hits(lm, hidden, targets), state

    return _Programs(empty, read)

"""The compiled half of generation: prefill in pieces of one shape, then one-token steps, on ids."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from eval.sampling import Sampling, pick, row_keys
from models.functional import Functional

Params = Any
Carry = Any  # (token [B], state, seen [B, V] or None, step)
STEPS_PER_CALL = 64  # decode steps compiled into one program: dispatch is paid once for them
PIECE = 1024  # tokens of a prompt read at once: bounds the activations of a long prompt


class RoomError(ValueError):
    """Prompt and continuation do not fit in the cache or the positions of the model."""


def decode(
    model: Functional,
    params: Params,
    prompts: Sequence[Int[np.ndarray, " L"]],
    new_tokens: int,
    sampling: Sampling,
    *,
    max_len: int | None = None,
    piece: int = PIECE,
    steps: int = STEPS_PER_CALL,
) -> Iterator[Int[np.ndarray, "B T"]]:
    """Ids that continue ``prompts``, in blocks as they are made: first of 1, then of at most ``steps``.

    Memory is that of the model's state whatever ``new_tokens``; close the iterator to stop early. A row's
    ids do not depend on the other rows, nor on ``piece``, ``steps`` and ``max_len`` (but for rounding).

    Args:
        piece: tokens of the prompts read at once; a model that decimates them reads them whole.
        max_len: tokens an attention cache has room for; None for exactly enough.

    Raises:
        ValueError: no prompt, an empty one, or fewer than one new token.
        RoomError: the longest prompt and ``new_tokens`` exceed ``max_len`` or the learned positions.
    """
    _check(model, prompts, new_tokens, max_len)
    longest = max(len(p) for p in prompts)
    keys = row_keys(sampling.seed, [np.asarray(p, np.int32).tobytes() for p in prompts])
    programs = programs_of(model, dataclasses.replace(sampling, seed=0), min(steps, max(new_tokens - 1, 1)))
    state = programs.empty(params, len(prompts), max_len or longest + new_tokens)
    hidden = None
    whole = model.bind(model.shapes).config.reads_whole
    for tokens, ids in pieces(prompts, longest if whole else min(piece, longest)):
        hidden, state = programs.read(params, tokens, ids, state, hidden)
    seen = None if sampling.repetition_penalty == 1 else _seen(prompts, model)
    carry = programs.first(params, keys, hidden, state, seen)
    yield np.asarray(carry[0])[:, None]
    left = new_tokens - 1
    apart = taken_apart(model, params) if left else None
    while left > 0:
        carry, tokens = programs.go_on(params, apart, keys, carry)
        yield np.asarray(tokens).T[:, :left]
        left -= tokens.shape[0]


def pieces(
    prompts: Sequence[Int[np.ndarray, " L"]], piece: int
) -> Iterator[tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]]:
    """``(tokens, segment_ids)`` of at most ``piece`` columns, right-padded with segment 0, in order."""
    lengths = np.array([len(p) for p in prompts])
    for start in range(0, int(lengths.max()), piece):
        tokens = np.zeros((len(prompts), piece), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + piece]
            tokens[row, : len(part)] = part
        yield tokens, (start + np.arange(piece) < lengths[:, None]).astype(np.int32)


def _check(model: Functional, prompts: Sequence[Any], new_tokens: int, max_len: int | None) -> None:
    if not prompts:
        raise ValueError("generate: there is no prompt; give at least one")
    empty = [i for i, p in enumerate(prompts) if not len(p)]
    if empty:
        raise ValueError(
            f"generate: prompt {empty[0]} is empty; give at least one token, such as the document separator"
        )
    if new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens={new_tokens} should be at least 1")
    config, limits = model.bind(model.shapes).config, {}
    if max_len is not None and config.state_grows:
        limits["the key/value cache (max_len)"] = max_len
    if config.longest is not None:
        limits["the learned positions (model.max_positions)"] = config.longest
    length = max(len(p) for p in prompts)
    for name, limit in limits.items():
        if length + new_tokens > limit:
            raise RoomError(
                f"generate: a prompt of {length} tokens and {new_tokens} new ones need room for "
                f"{length + new_tokens}, but {name} has {limit}; shorten the prompt or raise it"
            )


def _seen(prompts: Sequence[np.ndarray], model: Functional) -> Array:
    seen = np.zeros((len(prompts), model.bind(model.shapes).config.padded_vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen[row, prompt] = True
    return jnp.asarray(seen)


@functools.partial(jax.jit, static_argnums=0)
def taken_apart(model: Functional, params: Params) -> Any:
    """Layers for many steps (`Backbone.put_apart`): what is stacked is copied once, and not by each call."""
    return model.bind(params).backbone.take_apart()


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions: the empty state, reading a piece of the prompts, the first ids; and, with layers
    that were :func:`taken_apart`, some steps more."""

    empty: Any
    read: Any
    first: Any
    go_on: Any


@functools.lru_cache(maxsize=8)
def programs_of(model: Functional, sampling: Sampling, steps: int) -> Programs:
    """Those of a model that go on by ``steps`` tokens a call; ``sampling.seed`` is not read, give 0."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def empty(params: Params, batch: int, max_len: int) -> Any:
        return model.bind(params).init_state(batch, max_len)

    @functools.partial(jax.jit, donate_argnums=3)
    def read(params: Params, tokens: Array, segment_ids: Array, state: Any, before: Array | None) -> Any:
        """Hidden state of each row's last real token so far [B, D], and the model's state."""
        hidden, state, _ = model.bind(params)(tokens, state, segment_ids=segment_ids)
        count = jnp.sum(segment_ids != 0, axis=1)
        last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return (last if before is None else jnp.where((count > 0)[:, None], last, before)), state

    def draw(lm: Any, keys: Array, hidden: Array, seen: Array | None, step: Array) -> tuple[Array, Any]:
        token = pick(lm.logits(hidden), keys, step, seen, sampling)
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        return token, seen

    @functools.partial(jax.jit, donate_argnums=3)
    def first(params: Params, keys: Array, hidden: Array, state: Any, seen: Array | None) -> Carry:
        step = jnp.zeros((), jnp.int32)
        token, seen = draw(model.bind(params), keys, hidden, seen, step)
        return token, state, seen, step + 1

    @functools.partial(jax.jit, donate_argnums=3)
    def go_on(params: Params, apart: Any, keys: Array, carry: Carry) -> tuple[Carry, Array]:
        lm = model.bind(params)
        lm.backbone.put_apart(apart)

        def one(carry: Carry, _: None) -> tuple[Carry, Array]:
            token, state, seen, step = carry
            hidden, state, _ = lm(token[:, None], state)
            token, seen = draw(lm, keys, hidden[:, -1], seen, step)
            return (token, state, seen, step + 1), token

        return jax.lax.scan(one, carry, None, length=steps)

    return Programs(empty, read, first, go_on)

"""Continuations: one prefill of the prompt, then one-token decode steps, all under jit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from models.functional import Functional

Params = Any
STEPS_PER_CALL = 64  # decode steps compiled into one program: dispatch is paid once for them


def generate(
    model: Functional,
    params: Params,
    prompt: Int[np.ndarray, "B L"],
    new_tokens: int,
    *,
    max_len: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    segment_ids: Int[np.ndarray, "B L"] | None = None,
) -> Int[np.ndarray, "B T"]:
    """``new_tokens`` further ids for each row of ``prompt``.

    Args:
        model, params: an LM and its parameters.
        prompt: ids; rows of different lengths are padded, with ``segment_ids`` 0 at padding and 1 elsewhere.
        max_len: tokens an attention cache has room for; None for exactly enough.
        temperature: 0 takes the most likely token.
        seed: of the sampling.

    Raises:
        ValueError: an empty prompt, or prompt and continuation exceed ``max_len`` or the learned positions.
    """
    batch, length = prompt.shape
    if length == 0:
        raise ValueError(
            "generate: the prompt is empty; give at least one token, such as the document separator"
        )
    needed = length + new_tokens
    room = needed if max_len is None else max_len
    _check_room(model, length, new_tokens, room)
    prefill, decode = _programs(model, float(temperature))
    state = jax.jit(lambda p: model.bind(p).init_state(batch, room))(params)
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    logits, state = prefill(params, jnp.asarray(prompt), ids, state)
    key = jax.random.key(seed)
    token, key = _pick(logits, key, temperature)
    out = [np.asarray(token)[:, None]]
    for _ in range(-(-(new_tokens - 1) // STEPS_PER_CALL)):
        (token, state, key), tokens = decode(params, (token, state, key))
        out.append(np.asarray(tokens).T)
    return np.concatenate(out, axis=1)[:, :new_tokens]


def _check_room(model: Functional, length: int, new_tokens: int, room: int) -> None:
    config = model.bind(model.shapes).config
    limits = {}
    if "*" in config.layers and config.attention.window is None:
        limits["the key/value cache (max_len)"] = room
    if config.max_positions is not None:
        limits["the learned positions (model.max_positions)"] = config.max_positions
    for name, limit in limits.items():
        if length + new_tokens > limit:
            raise ValueError(
                f"generate: a prompt of {length} tokens and {new_tokens} new ones need room for "
                f"{length + new_tokens}, but {name} has {limit}; shorten the prompt or raise it"
            )


def _pick(logits: jax.Array, key: jax.Array, temperature: float) -> tuple[Int[Array, " B"], jax.Array]:
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), key
    key, use = jax.random.split(key)
    return jax.random.categorical(use, logits / temperature).astype(jnp.int32), key


@functools.lru_cache(maxsize=8)
def _programs(model: Functional, temperature: float) -> tuple[Any, Any]:
    """(prefill, decode), compiled once per model and shape."""

    @functools.partial(jax.jit, donate_argnums=3)
    def prefill(params: Params, tokens: Array, segment_ids: Array | None, state: Any) -> tuple[Array, Any]:
        lm = model.bind(params)
        hidden, state, _ = lm(tokens, state, segment_ids=segment_ids)
        if segment_ids is None:
            return lm.logits(hidden[:, -1]), state
        last = tokens.shape[1] - 1 - jnp.argmax(segment_ids[:, ::-1] != 0, axis=1)
        return lm.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), state

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params: Params, carry: Any) -> tuple[Any, Array]:
        lm = model.bind(params)

        def step(carry: Any, _: None) -> tuple[Any, Array]:
            token, state, key = carry
            hidden, state, _ = lm(token[:, None], state)
            token, key = _pick(lm.logits(hidden[:, -1]), key, temperature)
            return (token, state, key), token

        return jax.lax.scan(step, carry, None, length=STEPS_PER_CALL)

    return prefill, decode

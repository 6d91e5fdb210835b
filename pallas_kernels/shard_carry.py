"""The state that enters each piece of time of a recurrence whose time is sharded: one all-gather.

A piece of time acts on the state that enters it through a summary: S_out = advance(S_in, *summary), for a
diagonal recurrence product * S_in + own. Every device computes the summaries of its own pieces, gathers
everybody's, and goes through them in the order of time: the pieces before each of its own give the state that
its tokens start from, all of them give the final state, so nothing has to be sent twice. Which device holds
which pieces (``time_order``) does not matter. The number and the size of what is sent do not depend on L.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int, Shaped

from pallas_kernels import spmd, time_order


def entering_and_final(
    product: Inexact[Array, "rows ..."],
    own: Inexact[Array, "rows ..."],
    state: Inexact[Array, "B ..."],
    segment_ids: Int[Array, "rows L"] | None,
    *,
    reverse: bool = False,
) -> tuple[Inexact[Array, "rows ..."], Inexact[Array, "B ..."]]:
    """:func:`exchange` for a diagonal recurrence.

    Args:
        product: what each piece's tokens multiply the state that enters by; 0 across a reset.
        own: the state its tokens leave when zero enters. float32 or wider, real or complex.
    """
    summary = (product.astype(own.dtype), own)
    advance = lambda S, product, own: product * S + own  # noqa: E731
    return exchange(advance, summary, state, segment_ids, reverse=reverse)


def exchange(
    advance: Callable[..., jax.Array],
    summary: Sequence[Shaped[Array, "rows ..."]],
    state: Inexact[Array, "B ..."],
    segment_ids: Int[Array, "rows L"] | None,
    *,
    reverse: bool = False,
) -> tuple[Inexact[Array, "rows ..."], Inexact[Array, "B ..."]]:
    """The states entering this device's pieces, and the state after all; for use inside a ``shard_map``.

    Args:
        advance: ``advance(S, *summary)`` is the state [B, ...] after a piece that S enters.
        summary: of each piece, in rows as ``time_order.split`` makes them; floats, complex or int32.
        state: the incoming state of the first piece (of the last one if ``reverse``), float32 or wider.
        segment_ids: of the pieces' tokens; a piece that begins with another segment than the last real token
            before it starts from zero.
        reverse: time runs backwards, from the last piece to the first.
    """
    batch, rows = state.shape[0], summary[0].shape[0]
    pieces = rows // batch
    edges = [] if segment_ids is None else [_edge_ids(segment_ids)]
    sent = [*summary, *edges]
    shapes = [(t.shape[1:], t.dtype) for t in sent]
    packed = jnp.concatenate([_pack(t, state.real.dtype) for t in sent], axis=1)  # one collective
    gathered = jax.lax.all_gather(packed.reshape(batch, pieces, -1), spmd.SEQUENCE)
    here = time_order.numbers(jax.lax.axis_index(spmd.SEQUENCE), gathered.shape[0], pieces)

    def step(carry, piece):
        S, segment, entering = carry
        index, packed = piece
        found = _unpack(packed, shapes)
        if edges:
            *found, ids = found
            first, last = (ids[:, 1], ids[:, 0]) if reverse else (ids[:, 0], ids[:, 1])
            continues = (first == 0) | (segment == 0) | (first == segment)
            S = jnp.where(continues.reshape(-1, *[1] * (S.ndim - 1)), S, 0)
            segment = jnp.where(last == 0, segment, last)
        mine = (index == here).reshape(1, pieces, *[1] * (S.ndim - 1))
        entering = jnp.where(mine, S[:, None], entering)
        return (advance(S, *found), segment, entering), None

    nothing_yet = jnp.zeros((batch, pieces, *state.shape[1:]), state.dtype)
    start = (state, jnp.zeros(batch, jnp.int32), nothing_yet)
    in_time = time_order.in_time(gathered)
    walk = (jnp.arange(in_time.shape[0]), in_time)
    (final, _, entering), _ = jax.lax.scan(step, start, walk, reverse=reverse)
    return entering.reshape(rows, *state.shape[1:]), final


def _pack(t: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[rows, n] real; integers as halves, which float32 holds exactly."""
    if jnp.iscomplexobj(t):
        t = jnp.stack([t.real, t.imag], axis=1)
    elif jnp.issubdtype(t.dtype, jnp.integer):
        t = jnp.stack([t >> 16, t & 0xFFFF], axis=1)
    return t.reshape(t.shape[0], -1).astype(dtype)


def _unpack(packed: jax.Array, shapes: Sequence[tuple[tuple[int, ...], jnp.dtype]]) -> list[jax.Array]:
    """Inverse of :func:`_pack` of several arrays side by side, given their shapes without rows and dtypes."""
    found, start = [], 0
    for shape, dtype in shapes:
        halved = not jnp.issubdtype(dtype, jnp.floating)
        stop = start + math.prod(shape) * (2 if halved else 1)
        t, start = packed[:, start:stop], stop
        if halved:
            a, b = jnp.moveaxis(t.reshape(t.shape[0], 2, *shape), 1, 0)
            is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
            t = jax.lax.complex(a, b) if is_complex else (a.astype(dtype) << 16) | b.astype(dtype)
        found.append(t.reshape(-1, *shape).astype(dtype))
    return found


def _edge_ids(segment_ids: jax.Array) -> jax.Array:
    """Ids of the first and the last real token [rows, 2]; 0 where every token is padding."""
    real = segment_ids != 0
    first = jnp.argmax(real, axis=1)
    last = segment_ids.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.take_along_axis(segment_ids, jnp.stack([first, last], axis=1), axis=1)

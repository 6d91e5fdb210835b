"""The convolution on a device mesh: one manual ``shard_map``, one permute a piece when time is sharded."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Int

from pallas_kernels import spmd, time_order
from pallas_kernels.causal_conv1d import xla

Input = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # x, weight, bias, initial_state


def causal_conv1d(
    local: Callable[..., tuple[jax.Array, jax.Array]],
    mesh: AbstractMesh,
    inputs: list[Input],
    segment_ids: Int[Array, "B L"] | None,
) -> list[tuple[jax.Array, jax.Array]]:
    """``local(x, weight, bias, initial_state, segment_ids)`` of every input, on every device's part.

    A mesh axis whose size does not divide its dimension is left replicated; so is time where a piece would be
    shorter than K-1 tokens. Replicated final states cost one all-reduce of K-1 rows where they are used.
    """
    rows, length, _ = inputs[0][0].shape
    batch = spmd.axes_dividing(mesh, spmd.BATCH, rows)
    time, pieces = time_order.shard("causal_conv1d", mesh, length)
    parts = mesh.shape[spmd.SEQUENCE]
    size = length if time is None else length // (parts * pieces)
    if size < inputs[0][3].shape[1]:
        time = None
    # First and last real token of each row; 0 and 0 in a row of padding: the first piece passes its state on.
    if segment_ids is None:
        first, last = jnp.zeros((2, rows), jnp.int32).at[1].set(length - 1)
    else:
        real, index = segment_ids != 0, time_order.positions(length)
        first = jnp.min(jnp.where(real, index, length), axis=1) % length
        last = jnp.max(jnp.where(real, index, 0), axis=1)

    def device(inputs, segment_ids, first, last):
        if time is None:
            return _whole(local, inputs, segment_ids, parts, pieces)
        here = time_order.numbers(jax.lax.axis_index(spmd.SEQUENCE), parts, pieces)
        starts_here, ends_here = ((row[:, None] // size == here).reshape(-1) for row in (first, last))
        segment_ids = time_order.split(segment_ids, pieces)
        inputs = [
            (time_order.split(x, pieces), weight, bias, jnp.repeat(state, pieces, axis=0))
            for x, weight, bias, state in inputs
        ]
        pasts = _pasts(inputs, segment_ids, starts_here, pieces)
        results = [local(*each[:3], past, segment_ids) for each, past in zip(inputs, pasts)]
        ends = [jnp.where(ends_here[:, None, None], final, 0) for _, final in results]
        ends = [t.reshape(-1, pieces, *t.shape[1:]).sum(axis=1) for t in ends]
        finals = jax.lax.psum(ends, spmd.SEQUENCE)
        return [(time_order.join(y, pieces), final) for (y, _), final in zip(results, finals)]

    def specs(x):
        channels = spmd.axes_dividing(mesh, spmd.TENSOR, x.shape[2])
        by_token, by_state = PartitionSpec(batch, time, channels), PartitionSpec(batch, None, channels)
        return by_token, PartitionSpec(None, channels), PartitionSpec(channels), by_state

    in_specs = [specs(x) for x, _, _, _ in inputs]
    by_row = PartitionSpec(batch)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(in_specs, PartitionSpec(batch, time), by_row, by_row),
        out_specs=[(by_token, by_state) for by_token, _, _, by_state in in_specs],
        check_vma=False,
    )(inputs, segment_ids, first, last)


def _whole(local: Callable, inputs: list[Input], segment_ids, parts: int, pieces: int):
    """The results of a device that has all of time."""
    order = time_order.ORDERS[pieces - 1]
    ids = None if segment_ids is None else time_order.restore(segment_ids, order, parts)
    results = [local(time_order.restore(x, order, parts), *rest, ids) for x, *rest in inputs]
    return [(time_order.arrange(y, order, parts), final) for y, final in results]


def _pasts(inputs: list[Input], segment_ids, starts_here, pieces: int) -> list[jax.Array]:
    """The K-1 rows before each piece's first real token, [rows, K-1, C], of every input.

    In the piece of the row's first real token they are the incoming state. Elsewhere they are the last rows
    of the piece before, as far as they are of the segment that the piece begins with.
    """
    states = [jnp.where(starts_here[:, None, None], state.astype(x.dtype), 0) for x, _, _, state in inputs]
    extended = [xla.extend(x, state, segment_ids) for (x, _, _, _), state in zip(inputs, states)]
    length = inputs[0][0].shape[1]
    ids = extended[0][1]
    # Rows of all inputs, and their ids, travel together; ids as halves, which any float of 16 mantissa bits
    # or more holds exactly.
    dtype = jnp.result_type(*(x.dtype for x, _, _, _ in inputs), *(() if ids is None else (jnp.float32,)))
    columns = [rows[:, length:].astype(dtype) for rows, _ in extended]
    columns += [] if ids is None else [_halves(ids[:, length:]).astype(dtype)]
    tails = jnp.concatenate(columns, axis=-1)
    halo = time_order.from_previous(tails.reshape(-1, pieces, *tails.shape[1:])).reshape(tails.shape)
    *halos, halves = jnp.split(halo, list(itertools.accumulate(x.shape[2] for x, _, _, _ in inputs)), axis=-1)
    if ids is not None:
        halves = halves.astype(jnp.int32)
        halo_ids = (halves[..., 0] << 16) | halves[..., 1]
        same = jnp.cumprod((halo_ids == segment_ids[:, :1])[:, ::-1], axis=1)[:, ::-1]
        halos = [jnp.where((same != 0)[..., None], halo, 0) for halo in halos]
    starts = starts_here[:, None, None]
    return [jnp.where(starts, state, halo.astype(state.dtype)) for state, halo in zip(states, halos)]


def _halves(ids: jax.Array) -> jax.Array:
    return jnp.stack([ids >> 16, ids & 0xFFFF], axis=-1).astype(jnp.float32)

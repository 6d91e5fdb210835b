"""The convolution on a device mesh: one manual ``shard_map``, one permute when time is sharded."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import spmd
from pallas_kernels.causal_conv1d import xla


def causal_conv1d(
    local: Callable,
    mesh: AbstractMesh,
    x: Float[Array, "B L C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, " C"],
    initial_state: Float[Array, "B K-1 C"],
    segment_ids: Int[Array, "B L"] | None,
) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """``local(x, weight, bias, initial_state, segment_ids)`` on every device's part.

    A mesh axis whose size does not divide its dimension is left replicated; so is time where a shard would be
    shorter than K-1 tokens. Replicating the final state costs one all-reduce of K-1 rows where it is used.
    """
    length, taps_before = x.shape[1], initial_state.shape[1]
    batch = spmd.axes_dividing(mesh, spmd.BATCH, x.shape[0])
    channels = spmd.axes_dividing(mesh, spmd.TENSOR, x.shape[2])
    time = spmd.axes_dividing(mesh, spmd.SEQUENCE, length)
    if time is not None and length // mesh.shape[spmd.SEQUENCE] < taps_before:
        time = None
    shard_length = length // mesh.shape[spmd.SEQUENCE] if time is not None else length
    # First and last real token of each row; 0 and 0 in a row of padding, whose state the first shard passes
    # on.
    if segment_ids is None:
        first, last = jnp.zeros((2, x.shape[0]), jnp.int32).at[1].set(length - 1)
    else:
        first = jnp.argmax(segment_ids != 0, axis=1)
        last = jnp.max(jnp.where(segment_ids != 0, jnp.arange(length), 0), axis=1)

    def device(x, weight, bias, state, segment_ids, first, last):
        if time is None:
            return local(x, weight, bias, state, segment_ids)
        here = jax.lax.axis_index(spmd.SEQUENCE)
        starts_here = first // shard_length == here
        past = _past(x, state, segment_ids, starts_here)
        y, final = local(x, weight, bias, past, segment_ids)
        final = jnp.where((last // shard_length == here)[:, None, None], final, 0)
        return y, jax.lax.psum(final, spmd.SEQUENCE)

    by_token = PartitionSpec(batch, time, channels)
    by_channel = PartitionSpec(None, channels)
    by_state = PartitionSpec(batch, None, channels)
    by_row = PartitionSpec(batch)
    by_id = PartitionSpec(batch, time)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(by_token, by_channel, PartitionSpec(channels), by_state, by_id, by_row, by_row),
        out_specs=(by_token, by_state),
        check_vma=False,
    )(x, weight, bias, initial_state, segment_ids, first, last)


def _past(x, state, segment_ids, starts_here) -> jax.Array:
    """The K-1 rows before this shard's first real token, [B, K-1, C].

    In the shard of the row's first real token they are the incoming state. Elsewhere they are the last rows
    of the shard before, as far as they are of the segment this shard begins with.
    """
    state = jnp.where(starts_here[:, None, None], state.astype(x.dtype), 0)
    rows, ids = xla.extend(x, state, segment_ids)
    halo = rows[:, x.shape[1] :]
    if ids is not None:  # ids travel with the rows, as halves: both fit any float of 16 mantissa bits or more
        halo = jnp.concatenate(
            [halo.astype(jnp.promote_types(x.dtype, jnp.float32)), _halves(ids[:, x.shape[1] :])], -1
        )
    size = jax.lax.axis_size(spmd.SEQUENCE)
    halo = jax.lax.ppermute(halo, spmd.SEQUENCE, [(i, i + 1) for i in range(size - 1)])
    if ids is not None:
        halves = halo[..., x.shape[2] :].astype(jnp.int32)
        halo_ids = (halves[..., 0] << 16) | halves[..., 1]
        same = jnp.cumprod((halo_ids == segment_ids[:, :1])[:, ::-1], axis=1)[:, ::-1]
        halo = jnp.where((same != 0)[..., None], halo[..., : x.shape[2]].astype(x.dtype), 0)
    return jnp.where(starts_here[:, None, None], state, halo)


def _halves(ids: jax.Array) -> jax.Array:
    return jnp.stack([ids >> 16, ids & 0xFFFF], axis=-1).astype(jnp.float32)

"""SSD on a device mesh: one manual ``shard_map``, and one all-gather when time is sharded.

A shard of time acts on the state that enters it as S_out = e^(total) S_in + S_own. Every device computes
its own (total, S_own) with one matrix product, gathers everybody's, and combines them: the shards before it
give the state its tokens start from, all of them give the final state, so nothing has to be sent twice.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import spmd
from pallas_kernels.segments import reset_runs
from pallas_kernels.ssd.unfused import scaled


def ssd(
    local: Callable,
    mesh: AbstractMesh,
    x: Float[Array, "B L H P"],
    scale: Float[Array, "B L H"] | None,
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, " H"] | None,
    state: Float[Array, "B H P N"],
    segment_ids: Int[Array, "B L"] | None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """``local(x, scale, log_decay, B, C, D, state, segment_ids)`` on every device's part.

    A mesh axis whose size does not divide its dimension is left replicated.

    Raises:
        ValueError: the tensor axis splits the heads, but neither do its parts divide the groups nor the
        reverse.
    """
    batch = spmd.axes_dividing(mesh, spmd.BATCH, x.shape[0])
    time = spmd.axes_dividing(mesh, spmd.SEQUENCE, x.shape[1])
    heads = spmd.axes_dividing(mesh, spmd.TENSOR, x.shape[2])
    groups = spmd.axes_dividing(mesh, spmd.TENSOR, B.shape[2])
    pick_group = heads is not None and groups is None
    if pick_group and mesh.shape[spmd.TENSOR] % B.shape[2]:
        raise ValueError(
            f"ssd: {B.shape[2]} groups (n_groups) over a tensor axis of {mesh.shape[spmd.TENSOR]} devices; "
            "one must be a multiple of the other."
        )
    by_token = PartitionSpec(batch, time)
    by_head = PartitionSpec(batch, time, heads)
    by_group = PartitionSpec(batch, time, groups)
    by_state = PartitionSpec(batch, heads)

    def device(x, scale, log_decay, B, C, D, state, segment_ids):
        if pick_group:  # the heads of this device are all of one group
            group = jax.lax.axis_index(spmd.TENSOR) * B.shape[2] // mesh.shape[spmd.TENSOR]
            B, C = (jax.lax.dynamic_slice_in_dim(t, group, 1, axis=2) for t in (B, C))
        if time is None:
            return local(x, scale, log_decay, B, C, D, state, segment_ids)
        state, final = _carries(scaled(x, scale), log_decay, B, state, segment_ids)
        return local(x, scale, log_decay, B, C, D, state, segment_ids)[0], final

    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, by_group, by_group, PartitionSpec(heads), by_state, by_token),
        out_specs=(by_head, by_state),
        check_vma=False,
    )(x, scale, log_decay, B, C, D, state, segment_ids)


def _carries(u, log_decay, B, state, segment_ids) -> tuple[jax.Array, jax.Array]:
    """The state entering this shard of time, and the state after the last one, [B, H, P, N]."""
    total, own = _summary(u, log_decay, B, segment_ids)
    columns = [own.reshape(*own.shape[:2], -1), total[..., None]]
    if segment_ids is not None:  # one collective: ids travel as halves, which float32 holds exactly
        edge_ids = _edge_ids(segment_ids)
        halves = jnp.stack([edge_ids >> 16, edge_ids & 0xFFFF], axis=-1).reshape(-1, 1, 4).astype(own.dtype)
        columns.append(jnp.broadcast_to(halves, (*total.shape, 4)))
    gathered = jax.lax.all_gather(jnp.concatenate(columns, axis=-1), spmd.SEQUENCE)
    here = jax.lax.axis_index(spmd.SEQUENCE)
    size = own[0, 0].size

    def combine(carry, shard):
        S, segment, entering = carry
        index, packed = shard
        own, total = packed[..., :size].reshape(S.shape), packed[..., size]
        kept = S
        if segment_ids is not None:
            halves = packed[:, 0, size + 1 :].astype(jnp.int32)
            first, last = (halves[:, 0] << 16) | halves[:, 1], (halves[:, 2] << 16) | halves[:, 3]
            continues = (first == 0) | (segment == 0) | (first == segment)
            kept = jnp.where(continues[:, None, None, None], S, 0)
            segment = jnp.where(last == 0, segment, last)
        entering = jnp.where(index == here, kept, entering)
        return (jnp.exp(total)[..., None, None] * kept + own, segment, entering), None

    nothing_yet = jnp.zeros(state.shape[0], jnp.int32)
    shards = (jnp.arange(gathered.shape[0]), gathered)
    (final, _, entering), _ = jax.lax.scan(combine, (state, nothing_yet, jnp.zeros_like(state)), shards)
    return entering, final


def _summary(u, log_decay, B, segment_ids) -> tuple[jax.Array, jax.Array]:
    """Total log decay [B, H] (-inf across a reset) and the state of these tokens alone [B, H, P, N]."""
    batch, length, heads, headdim = u.shape
    groups, d_state = B.shape[2:]
    dtype = log_decay.dtype
    log_decay = jnp.maximum(log_decay, jnp.log(jnp.finfo(dtype).tiny))
    suffix = jax.lax.cumsum(log_decay, axis=1, reverse=True)
    total, to_end = suffix[:, 0], suffix - log_decay
    if segment_ids is not None:
        runs = reset_runs(segment_ids)
        to_end = jnp.where((runs == runs[:, -1:])[..., None], to_end, -jnp.inf)
        total = jnp.where(runs[:, -1:] == 0, total, -jnp.inf)
    operand = jnp.result_type(u, B)
    written = (u * jnp.exp(to_end)[..., None]).astype(operand).reshape(batch, length, groups, -1)
    own = jnp.einsum("blgc,blgn->bgcn", written, B.astype(operand), preferred_element_type=dtype)
    return total, own.reshape(batch, heads, headdim, d_state)


def _edge_ids(segment_ids: jax.Array) -> jax.Array:
    """Ids of the first and the last real token [B, 2]; 0 where every token is padding."""
    real = segment_ids != 0
    first = jnp.argmax(real, axis=1)
    last = segment_ids.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.take_along_axis(segment_ids, jnp.stack([first, last], axis=1), axis=1)

"""SSD on a device mesh: one manual ``shard_map``, and one all-gather when time is sharded.

A piece of time acts on the state that enters it as S_out = e^(total) S_in + S_own. Every device computes
(total, S_own) of its pieces with one matrix product; ``shard_carry`` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import spmd, time_order
from pallas_kernels.segments import reset_runs
from pallas_kernels.shard_carry import exchange
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
    time, pieces = time_order.shard("ssd", mesh, x.shape[1])
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
        by_piece = (time_order.split(t, pieces) for t in (x, scale, log_decay, B, C, segment_ids))
        x, scale, log_decay, B, C, segment_ids = by_piece
        summary = _summary(scaled(x, scale), log_decay, B, segment_ids)
        state, final = exchange(_advance, summary, state, segment_ids)
        return time_order.join(local(x, scale, log_decay, B, C, D, state, segment_ids)[0], pieces), final

    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, by_group, by_group, PartitionSpec(heads), by_state, by_token),
        out_specs=(by_head, by_state),
        check_vma=False,
    )(x, scale, log_decay, B, C, D, state, segment_ids)


def _advance(S: jax.Array, total: jax.Array, own: jax.Array) -> jax.Array:
    return jnp.exp(total)[..., None, None] * S + own


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

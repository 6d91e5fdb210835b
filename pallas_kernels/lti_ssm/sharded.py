"""LTI recurrences on a device mesh: one manual ``shard_map``, and one all-gather when time is sharded.

A piece of time with n real tokens acts on the state that enters it as S_out = A^n S_in + S_own (or S_own
alone, where it holds a reset). Every device computes (n, S_own) of its pieces; ``shard_carry`` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Inexact, Int

from pallas_kernels import spmd, time_order
from pallas_kernels.segments import reset_runs
from pallas_kernels.shard_carry import exchange


def lti_ssm(
    local: Callable,
    advance: Callable,
    mesh: AbstractMesh,
    u: Float[Array, "B L H"],
    parameters: tuple[jax.Array, jax.Array, jax.Array],
    state: Inexact[Array, "B H N"],
    segment_ids: Int[Array, "B L"] | None,
    reverse: bool,
) -> tuple[Float[Array, "B L H"], Inexact[Array, "B H N"]]:
    """``local(u, parameters, state, segment_ids, reverse)`` on every device's part.

    ``parameters`` are (A or log_A, B, C), each [H, ...]; ``advance(A, state, steps, bound)`` gives
    A^steps state. A mesh axis whose size does not divide its dimension is left replicated.
    """
    batch = spmd.axes_dividing(mesh, spmd.BATCH, u.shape[0])
    time, pieces = time_order.shard("lti_ssm", mesh, u.shape[1])
    heads = spmd.axes_dividing(mesh, spmd.TENSOR, u.shape[2])
    by_token, by_head = PartitionSpec(batch, time), PartitionSpec(heads)
    by_channel, by_state = PartitionSpec(batch, time, heads), PartitionSpec(batch, heads)

    def device(u, parameters, state, segment_ids):
        if time is None:
            return local(u, parameters, state, segment_ids, reverse)
        # Without its y, which nobody reads, this is only the products that write and the scan over chunks;
        # the former are those of the call below.
        u, segment_ids = (time_order.split(t, pieces) for t in (u, segment_ids))
        zeros = jnp.repeat(jnp.zeros_like(state), pieces, axis=0)
        own = local(u, parameters, zeros, segment_ids, reverse)[1]
        length = u.shape[1]
        steps = jnp.full(u.shape[0], length, jnp.int32) if segment_ids is None else _steps(segment_ids)

        def move(S, own, steps):
            moved = advance(parameters[0], S, jnp.maximum(steps, 0), length)
            return jnp.where((steps < 0)[:, None, None], 0, moved) + own

        state, final = exchange(move, (own, steps), state, segment_ids, reverse=reverse)
        return time_order.join(local(u, parameters, state, segment_ids, reverse)[0], pieces), final

    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(by_channel, by_head, by_state, by_token),
        out_specs=(by_channel, by_state),
        check_vma=False,
    )(u, parameters, state, segment_ids)


def _steps(segment_ids: Int[Array, "rows L"]) -> Int[Array, " rows"]:
    """Number of real tokens; -1 where one of them resets."""
    reset = reset_runs(segment_ids)[:, -1] > 0
    return jnp.where(reset, -1, jnp.sum(segment_ids != 0, axis=1)).astype(jnp.int32)

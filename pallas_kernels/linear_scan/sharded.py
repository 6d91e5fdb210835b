"""The linear scan on a device mesh: one manual ``shard_map``, and one all-gather when time is sharded.

Every device scans its pieces from zero, and their decays by themselves (b = 0 from one: their running
product). The gathered ends of both give the state that enters, and h = h_own + product * entering.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Inexact, Int

from pallas_kernels import spmd, time_order
from pallas_kernels.shard_carry import entering_and_final


def linear_scan(
    local: Callable,
    mesh: AbstractMesh,
    a: Inexact[Array, "B L D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B L D"],
    state: Inexact[Array, "B D"],
    segment_ids: Int[Array, "B L"] | None,
    reverse: bool,
) -> tuple[Inexact[Array, "B L D"], Inexact[Array, "B D"]]:
    """``local(a, b, state, segment_ids)`` on every device's part.

    A mesh axis whose size does not divide its dimension is left replicated.
    """
    batch = spmd.axes_dividing(mesh, spmd.BATCH, b.shape[0])
    time, pieces = time_order.shard("linear_scan", mesh, b.shape[1])
    channels = spmd.axes_dividing(mesh, spmd.TENSOR, b.shape[2])
    by_token = PartitionSpec(batch, time, channels)
    by_state = PartitionSpec(batch, channels)

    def device(a, b, state, segment_ids):
        if time is None:
            return local(a, b, state, segment_ids)
        a = a if a.ndim == 1 else time_order.split(a, pieces)
        b, segment_ids = (time_order.split(t, pieces) for t in (b, segment_ids))
        h, own = local(a, b, jnp.zeros_like(b[:, 0], state.dtype), segment_ids)
        rows = 1 if a.ndim == 1 and segment_ids is None else b.shape[0]  # the same decays in every row
        ones = jnp.ones_like(own[:rows])
        products, product = local(a, jnp.zeros_like(b[:rows]), ones, segment_ids)
        product = jnp.broadcast_to(product, own.shape)
        entering, final = entering_and_final(product, own, state, segment_ids, reverse=reverse)
        return time_order.join(h + products * entering[:, None], pieces), final

    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(
            by_token if a.ndim == 3 else PartitionSpec(channels),
            by_token,
            by_state,
            PartitionSpec(batch, time),
        ),
        out_specs=(by_token, by_state),
        check_vma=False,
    )(a, b, state, segment_ids)

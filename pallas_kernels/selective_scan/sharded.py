"""The selective scan on a device mesh: one manual ``shard_map``, one all-gather when time is sharded.

Time sharded costs a second pass over the tokens: every device scans its own from zero for the state they
leave, gathers everybody's, and scans again from the state that enters.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Inexact, Int

from pallas_kernels import spmd, time_order
from pallas_kernels.segments import reset_runs
from pallas_kernels.shard_carry import entering_and_final


def selective_scan(
    local: Callable,
    mesh: AbstractMesh,
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Inexact[Array, "E N"],
    B: Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    C: Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    state: Inexact[Array, "B E N"],
    segment_ids: Int[Array, "B L"] | None,
) -> tuple[Float[Array, "B L E"], Inexact[Array, "B E N"]]:
    """``local(x, dt, A, B, C, state, segment_ids)`` on every device's part.

    A mesh axis whose size does not divide its dimension is left replicated.

    Raises:
        ValueError: the tensor axis splits the channels, but neither do its parts divide the groups nor the
        reverse.
    """
    batch = spmd.axes_dividing(mesh, spmd.BATCH, x.shape[0])
    time, pieces = time_order.shard("selective_scan", mesh, x.shape[1])
    channels = spmd.axes_dividing(mesh, spmd.TENSOR, x.shape[2])
    specs, picks = zip(*(_groups(mesh, name, t, batch, time, channels) for name, t in (("B", B), ("C", C))))

    def device(x, dt, A, B, C, state, segment_ids):
        B, C = (pick(t) for pick, t in zip(picks, (B, C)))
        if time is None:
            return local(x, dt, A, B, C, state, segment_ids)
        x, dt, segment_ids = (time_order.split(t, pieces) for t in (x, dt, segment_ids))
        B, C = (t if t.ndim == 2 else time_order.split(t, pieces) for t in (B, C))
        _, own = local(x, dt, A, B, C, jnp.repeat(jnp.zeros_like(state), pieces, axis=0), segment_ids)
        product = jnp.exp(jnp.sum(dt, axis=1).astype(own.dtype)[..., None] * A)
        if segment_ids is not None:
            product = jnp.where((reset_runs(segment_ids)[:, -1] == 0)[:, None, None], product, 0)
        state, final = entering_and_final(product, own, state, segment_ids)
        return time_order.join(local(x, dt, A, B, C, state, segment_ids)[0], pieces), final

    by_token, by_state = PartitionSpec(batch, time, channels), PartitionSpec(batch, channels)
    rows = PartitionSpec(batch, time)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(by_token, by_token, PartitionSpec(channels), *specs, by_state, rows),
        out_specs=(by_token, by_state),
        check_vma=False,
    )(x, dt, A, B, C, state, segment_ids)


def _groups(
    mesh: AbstractMesh, name: str, t: jax.Array, batch, time, channels
) -> tuple[PartitionSpec, Callable]:
    """How B or C is split, and what a device takes of its part: the group of its channels."""
    if t.ndim == 2:
        return PartitionSpec(channels), lambda t: t
    groups = spmd.axes_dividing(mesh, spmd.TENSOR, t.shape[2])
    if channels is None:  # all channels on every device, and so all groups
        return PartitionSpec(batch, time), lambda t: t
    if groups is not None:
        return PartitionSpec(batch, time, groups), lambda t: t
    parts, count = mesh.shape[spmd.TENSOR], t.shape[2]
    if parts % count:
        raise ValueError(
            f"selective_scan: {name} has {count} groups for a tensor axis of {parts} devices; one must be a "
            "multiple of the other."
        )

    def pick(t):
        group = jax.lax.axis_index(spmd.TENSOR) * count // parts
        return jax.lax.dynamic_slice_in_dim(t, group, 1, axis=2)

    return PartitionSpec(batch, time), pick

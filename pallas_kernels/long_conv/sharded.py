"""The long convolution on a device mesh: sequences whole and channels split while it runs.

A kernel as long as the sequence lets every token reach every later one, so what is sent grows with the length
whatever one does. Least is an all-to-all there and one back, which turns a piece of time of all channels into
all of time for some of them: each device sends its own part of the input once, and none convolves what
another does.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels import spmd, time_order


def long_conv(
    local: Callable,
    mesh: AbstractMesh,
    u: Float[Array, "B L H"],
    forward: Float[Array, "H K"],
    backward: Float[Array, "H K"] | None,
) -> Float[Array, "B L H"]:
    """``local(u, forward, backward)`` on whole sequences of every device's channels.

    A mesh axis whose size does not divide its dimension is left replicated; time is gathered where the
    channels of a device do not split over the sequence axis.
    """
    batch = spmd.axes_dividing(mesh, spmd.BATCH, u.shape[0])
    heads = spmd.axes_dividing(mesh, spmd.TENSOR, u.shape[2])
    time, pieces = time_order.shard("long_conv", mesh, u.shape[1])
    parts, order = mesh.shape.get(spmd.SEQUENCE, 1), time_order.ORDERS[pieces - 1]
    here = u.shape[2] // (1 if heads is None else mesh.shape[spmd.TENSOR])
    split = time is not None and here % parts == 0
    by_token = PartitionSpec(batch, time if split else None, heads)
    own = tuple(axis for axis in (heads, time if split else None) if axis is not None)
    by_kernel = PartitionSpec(own or None)

    def device(u, forward, backward):
        if split:
            u = jax.lax.all_to_all(u, spmd.SEQUENCE, 2, 1, tiled=True)
        y = local(time_order.restore(u, order, parts), forward, backward)
        y = time_order.arrange(y, order, parts)
        return jax.lax.all_to_all(y, spmd.SEQUENCE, 1, 2, tiled=True) if split else y

    return jax.shard_map(
        device, mesh=mesh, in_specs=(by_token, by_kernel, by_kernel), out_specs=by_token, check_vma=False
    )(u, forward, backward)

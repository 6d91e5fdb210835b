"""Attention under a mesh: batch over (data, fsdp), heads over tensor, time over sequence.

Fully manual ``shard_map``. A source whose keys are split over time like the queries goes around the ring
(``ring.py``); the keys of any other source, a cache say, are replicated over the sequence axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import spmd
from pallas_kernels.attention import ring, xla
from pallas_kernels.attention.sources import Alibi, Source


def attention(
    mesh: AbstractMesh,
    run: Callable,
    q: Float[Array, "B Lq H E"],
    sources: tuple[Source, ...],
    q_segment_ids: Int[Array, "B Lq"] | None,
    scale: float,
    bias: Alibi | None,
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"] | None]:
    """Same contract as the reference. ``run`` computes what one device holds in full.

    Raises:
        ValueError: the tensor axis divides neither the heads nor is a multiple of the key heads; ``run`` is
            not "xla" and time is sharded.
    """
    batch = spmd.axes_dividing(mesh, spmd.BATCH, q.shape[0])
    time = spmd.axes_dividing(mesh, spmd.SEQUENCE, q.shape[1])
    tensor = spmd.TENSOR if mesh.shape.get(spmd.TENSOR, 1) > 1 else None
    if time is not None and run is not xla.attention:
        raise ValueError(
            f"attention: the sequence axis ({mesh.shape[spmd.SEQUENCE]} devices) needs implementation='xla'."
        )
    rings = [time is not None and _splits(mesh, source) for source in sources]
    splits = [_kv_axis(mesh, i, q.shape[2], source.k.shape[2]) for i, source in enumerate(sources)]

    def source_specs(on_ring: bool, heads: str | None) -> tuple:
        keys = time if on_ring else None
        kv = PartitionSpec(batch, keys, heads, None)
        return kv, kv, PartitionSpec(batch, time), *[PartitionSpec(batch, keys)] * 2, PartitionSpec(batch)

    def local(q, fields, q_segment_ids, slopes):
        bias = None if slopes is None else Alibi(slopes)
        parts = []
        for source, arrays, on_ring, split in zip(sources, fields, rings, splits):
            k, v, *rest = arrays
            if tensor is not None and split is None:
                k, v = (_own_kv_head(x, mesh.shape[tensor]) for x in (k, v))
            own = Source(k, v, *rest, mask=source.mask)
            if on_ring:
                part = ring.attend(time, mesh.shape[time], q, own, q_segment_ids, scale, bias)
            elif time is not None:
                own = _with_positions(own, q.shape[1], time)
                part = xla.attend(q, own, q_segment_ids, scale, bias, jnp.float32)
            else:
                parts.append(own)
                continue
            parts.append(part)
        if time is None:
            return run(q, parts, q_segment_ids, scale, bias)
        out, lse = functools.reduce(lambda a, b: xla.merge(*a, *b), parts)
        return out.astype(q.dtype), lse

    fields = [tuple(getattr(s, f.name) for f in dataclasses.fields(s))[:-1] for s in sources]
    specs = [source_specs(*x) for x in zip(rings, splits)]
    q_spec = PartitionSpec(batch, time, tensor, None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(q_spec, specs, PartitionSpec(batch, time), PartitionSpec(tensor)),
        out_specs=(q_spec, PartitionSpec(batch, tensor, time)),
        check_vma=False,
    )(q, fields, q_segment_ids, None if bias is None else bias.slopes)


def _splits(mesh: AbstractMesh, source: Source) -> bool:
    """Whether the keys are split over time. ``kv_length`` counts slots from the first: such a cache is whole."""
    return source.kv_length is None and source.k.shape[1] % mesh.shape[spmd.SEQUENCE] == 0


def _kv_axis(mesh: AbstractMesh, index: int, heads: int, kv_heads: int) -> str | None:
    """Mesh axis of the key heads: tensor, or None where every device takes the one key head it needs."""
    parts = mesh.shape.get(spmd.TENSOR, 1)
    if heads % parts == 0 and kv_heads % parts == 0:
        return spmd.TENSOR if parts > 1 else None
    if heads % parts == 0 and parts % kv_heads == 0:
        return None
    raise ValueError(
        f"attention: sources[{index}] has {heads} query and {kv_heads} key heads, which the tensor axis of "
        f"{parts} devices cannot split: it must divide num_heads, and divide num_kv_heads or be a multiple of it."
    )


def _own_kv_head(x: Float[Array, "B Lk K E"], parts: int) -> Float[Array, "B Lk 1 E"]:
    """The key head that this device's query heads share, of all."""
    head = jax.lax.axis_index(spmd.TENSOR) * x.shape[2] // parts
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)


def _with_positions(source: Source, length: int, axis: str) -> Source:
    """``source`` with the row index of this device's queries written out."""
    if source.q_positions is not None:
        return source
    positions = jax.lax.axis_index(axis) * length + jnp.arange(length, dtype=jnp.int32)
    return dataclasses.replace(source, q_positions=jnp.tile(positions, (source.k.shape[0], 1)))

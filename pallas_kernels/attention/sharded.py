"""Attention under a mesh: batch over (data, fsdp), heads over tensor, time over sequence.

Fully manual ``shard_map``. A source whose keys are split over time like the queries goes around the ring
(``ring.py``); the keys of any other source, a cache say, are replicated over the sequence axis. The order of
time in force (``time_order``) is that of the queries, and of keys of the same length that are split.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels import spmd, time_order
from pallas_kernels.attention import blockwise, cudnn, ring
from pallas_kernels.attention.sources import Alibi, Source, Tokens, wide


def attention(
    mesh: AbstractMesh,
    run: Callable,
    q: Float[Array, "B Lq H E"],
    sources: tuple[Source, ...],
    q_segment_ids: Int[Array, "B Lq"] | None,
    scale: float,
    bias: Alibi | None,
    implementation: str | None,
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"] | None]:
    """Same contract as the reference. ``run`` computes what one device holds in full.

    Raises:
        ValueError: the tensor axis divides neither the heads nor is a multiple of the key heads; ``run`` is
            "cudnn" and time is sharded.
    """
    batch = spmd.axes_dividing(mesh, spmd.BATCH, q.shape[0])
    parts, time_parts = mesh.shape.get(spmd.TENSOR, 1), mesh.shape.get(spmd.SEQUENCE, 1)
    time, pieces = time_order.shard("attention", mesh, q.shape[1])
    if time is not None and run is cudnn.attention:
        raise ValueError(
            f"attention: implementation='cudnn' cannot run on a sequence axis of {time_parts} devices; "
            "use None."
        )
    rings = [time is not None and _split_over_time(source, time_parts) for source in sources]
    shared = [_kv_heads_shared(parts, i, q.shape[2], s.k.shape[2]) for i, s in enumerate(sources)]

    def device(q, arrays, q_segment_ids, slopes):
        bias = None if slopes is None else Alibi(slopes)
        own = [
            _on_device(source, fields, pick_head, on_ring, parts)
            for source, fields, pick_head, on_ring in zip(sources, arrays, shared, rings)
        ]
        if time is None:
            return run(q, [source for source, _ in own], q_segment_ids, scale, bias)
        places = time, time_parts, pieces
        found = [
            _attend(places, q, source, tokens, on_ring, q_segment_ids, scale, bias, implementation)
            for (source, tokens), on_ring in zip(own, rings)
        ]
        out, lse = functools.reduce(lambda a, b: blockwise.merge(*a, *b), found)
        return out.astype(q.dtype), lse

    specs = [_specs(batch, time if on_ring else None, time, pick) for on_ring, pick in zip(rings, shared)]
    arrays = [{name: getattr(source, name) for name in spec} for source, spec in zip(sources, specs)]
    q_spec = PartitionSpec(batch, time, spmd.TENSOR)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(q_spec, specs, PartitionSpec(batch, time), PartitionSpec(spmd.TENSOR)),
        out_specs=(q_spec, PartitionSpec(batch, spmd.TENSOR, time)),
        check_vma=False,
    )(q, arrays, q_segment_ids, None if bias is None else bias.slopes)


def _on_device(
    source: Source, fields: dict, pick_head: bool, on_ring: bool, parts: int
) -> tuple[Source, Tokens]:
    """One device's part of a source; what is known of its tokens apart if they go around the ring."""
    fields, tokens = dict(fields), Tokens()
    if on_ring:
        positions, ids = fields.pop("kv_positions"), fields.pop("kv_segment_ids")
        tokens = Tokens(positions, ids, None, fields.pop("kv_window_positions"))
    part = Source(**fields, mask=source.mask)
    if pick_head:
        k, v = _own_kv_head(part.k, parts), _own_kv_head(part.v, parts)
        part = dataclasses.replace(part, k=k, v=v)
    return part, tokens


def _attend(places, q, source: Source, tokens: Tokens, on_ring: bool, ids, scale, bias, implementation):
    """One device's queries over one source: their output before it is cast, and the log of its weight."""
    axis, parts, pieces = places
    if on_ring:
        return ring.attend(axis, parts, pieces, q, source, tokens, ids, scale, bias, implementation)
    source = _with_positions(source, q.shape[1], parts, pieces)
    return blockwise.attend(q, source, ids, scale, bias, wide(q), implementation=implementation)


def _specs(batch, kv_time, q_time, pick_head: bool) -> dict[str, PartitionSpec]:
    """How the arrays of a source are split."""
    kv = PartitionSpec(batch, kv_time, None if pick_head else spmd.TENSOR)
    by_row = PartitionSpec(batch)  # what is known of the keys is whole on every device, on the ring too
    known = ("kv_positions", "kv_segment_ids", "kv_window_positions", "kv_length")
    return {"k": kv, "v": kv, **dict.fromkeys(known, by_row), "q_positions": PartitionSpec(batch, q_time)}


def _split_over_time(source: Source, parts: int) -> bool:
    """Whether the keys are split like the queries. A cache is not: ``kv_length`` counts from slot 0."""
    return source.kv_length is None and source.k.shape[1] % parts == 0


def _kv_heads_shared(parts: int, index: int, heads: int, kv_heads: int) -> bool:
    """Whether the key heads are whole on every device, which takes the one that its query heads share."""
    if heads % parts == 0 and kv_heads % parts == 0:
        return False
    if heads % parts == 0 and parts % kv_heads == 0:
        return True
    raise ValueError(
        f"attention: a tensor axis of {parts} devices cannot split the {heads} query and {kv_heads} key "
        f"heads of sources[{index}]: it must divide num_heads, and divide num_kv_heads or be a multiple of "
        "it."
    )


def _own_kv_head(x: Float[Array, "B Lk K E"], parts: int) -> Float[Array, "B Lk 1 E"]:
    """The key head that this device's query heads share, of all."""
    head = jax.lax.axis_index(spmd.TENSOR) * x.shape[2] // parts
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)


def _with_positions(source: Source, length: int, parts: int, pieces: int) -> Source:
    """``source`` with the index in time of this device's queries written out."""
    if source.q_positions is not None:
        return source
    positions = time_order.row_index(jax.lax.axis_index(spmd.SEQUENCE), length, parts, pieces)
    return dataclasses.replace(source, q_positions=jnp.tile(positions, (source.k.shape[0], 1)))


def in_time(sources: tuple[Source, ...], length: int) -> tuple[Source, ...]:
    """``sources`` with indices in time written out where the order of time is not that of the arrays."""
    index = time_order.positions(length)
    if (index[1:] > index[:-1]).all():
        return sources

    def place(source: Source) -> Source:
        keys, batch = source.k.shape[1], source.k.shape[0]
        whole = jnp.broadcast_to(index, (batch, length))
        q = whole if source.q_positions is None else source.q_positions
        own = keys == length and source.kv_length is None and source.kv_positions is None
        return dataclasses.replace(source, q_positions=q, kv_positions=whole if own else source.kv_positions)

    return tuple(place(source) for source in sources)

"""Pooling of groups: a core key and a core value of each, weighted by what the group's last token attends to.

Keys and values are read as slots of ``size`` tokens. A group that does not start with a slot (in packed rows)
ends in one and began in the slot before, so that two products with slots pool it: nothing is gathered, and
what is pooled is not copied for each token. Where time is sharded, a device gets the slot before its first
from its neighbour.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from pallas_kernels import spmd, time_order
from pallas_kernels.attention.sources import MASKED, wide
from pallas_kernels.cca.groups import Groups, fill

POOLINGS = ("mean", "per_head")


def pool(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B L K E"],
    v: Float[Array, "B L K E"],
    groups: Groups,
    *,
    scale: float,
    pooling: str = "mean",
    pooled_k: Float[Array, "B L K E"] | None = None,
) -> list[Float[Array, "B M C E"]]:
    """Core keys and core values: ``k`` and ``v`` weighted as every group's last query attends to its keys.

    Args:
        q, k, v: of the tokens.
        groups: where the groups are; a slot that no group ends in gives zeros.
        scale: of the logits.
        pooling: "mean": one weight for a key head, the mean over its query heads, and C = K; "per_head": the
            weights of every query head, and C = H.
        pooled_k: pooled in place of ``k``, which then only gives the weights.

    Raises:
        ValueError: zigzag order of time whose pieces ``groups.size`` does not divide.
    """
    size, ends, mesh = groups.size, groups.ends, spmd.active_mesh()
    time, pieces = (None, 1) if mesh is None else _shard(mesh, q.shape[1], size)
    keys = [k, v] if pooled_k is None else [k, v, pooled_k]
    if ends is None:
        used = groups.last.shape[1] * size
        q, *keys = (x[:, :used] for x in (q, *keys))
    else:
        q, ends, *keys = (fill(x, size) for x in (q, ends, *keys))
    local = functools.partial(_pool, size=size, scale=scale, pooling=pooling)
    if mesh is None:
        return local(q, ends, keys, None)
    batch = spmd.axes_dividing(mesh, spmd.BATCH, q.shape[0])
    heads = spmd.axes_dividing(mesh, spmd.TENSOR, k.shape[2])  # else each device pools all heads

    def device(q, ends, keys):
        if time is None:
            return local(q, ends, keys, None)
        q, ends, *keys = (time_order.split(x, pieces) for x in (q, ends, *keys))
        before = None if ends is None else _from_previous(keys, size, pieces)
        return [time_order.join(x, pieces) for x in local(q, ends, keys, before)]

    by_head, by_token = PartitionSpec(batch, time, heads), PartitionSpec(batch, time)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(by_head, by_token, [by_head] * len(keys)),
        out_specs=[by_head, by_head],
        check_vma=False,
    )(q, ends, keys)


def _shard(mesh: jax.sharding.AbstractMesh, length: int, size: int) -> tuple[str | None, int]:
    """The mesh axis that splits time, None where its pieces are not whole slots, and pieces on a device."""
    time, pieces = time_order.shard("core_context_attention", mesh, length)
    unit = mesh.shape.get(spmd.SEQUENCE, 1) * pieces * size
    if time is None or length % unit == 0:
        return time, pieces
    if pieces > 1:
        raise ValueError(
            f"core_context_attention: {length} tokens in zigzag order over mesh.sequence="
            f"{mesh.shape[spmd.SEQUENCE]} devices; with group_size={size} the length must be a multiple of "
            f"{unit}. Pad it, or compute it in contiguous order."
        )
    return None, pieces


def _from_previous(keys: Sequence[Array], size: int, pieces: int) -> list[Array]:
    """The last ``size`` tokens before each piece, rows as ``time_order.split`` makes them; one exchange."""
    last = jnp.concatenate([x[:, -size:] for x in keys], axis=-1)
    found = time_order.from_previous(last.reshape(-1, pieces, *last.shape[1:]))
    return jnp.split(found.reshape(last.shape), len(keys), axis=-1)


def _pool(
    q: Array, ends: Array | None, keys: Sequence[Array], before: Sequence[Array] | None, size, scale, pooling
) -> list[Array]:
    """:func:`pool` of what one device holds; ``before``: ``keys`` of the slot before the first one."""
    q, *slots = (_slots(x, size) for x in (q, *keys))
    if ends is None:
        return pool_slots(q[:, :, -1], [(slots, None)], scale, pooling)
    ends = _slots(ends, size)
    some, end = ends.any(-1, keepdims=True), ends.argmax(-1)[..., None]
    if before is None:
        before = [jnp.zeros_like(x[:, 0]) for x in slots]
    earlier = [jnp.concatenate([first[:, None], x[:, :-1]], axis=1) for first, x in zip(before, slots)]
    place = jnp.arange(size)
    last_q = jnp.where(ends[..., None, None], q, 0).sum(2)  # at most one is not zero
    parts = [(earlier, some & (place > end)), (slots, some & (place <= end))]
    return pool_slots(last_q, parts, scale, pooling)


def pool_slots(
    last_q: Float[Array, "B M H E"],
    parts: Sequence[tuple[Sequence[Array], Bool[Array, "_ M g"] | None]],
    scale: float,
    pooling: str,
) -> list[Float[Array, "B M C E"]]:
    """Core keys and core values, one of each a slot, from the tokens of several ``parts``.

    Args:
        last_q: query of the group's last token.
        parts: (k, v) or (k, v, pooled_k) of tokens [B, M, g, K, E], and which of them belong to the group
            (None: all). A slot without any gives zeros.
        scale, pooling: as in :func:`pool`.
    """
    kv_heads = parts[0][0][0].shape[3]
    rows = last_q.reshape(*last_q.shape[:2], kv_heads, -1, last_q.shape[-1])
    scores, members = [], []
    for (k, *_), member in parts:
        s = scale * _product("bmkge,bmike->bmkgi", rows, k)
        member = jnp.ones((1, 1, s.shape[-1]), bool) if member is None else member
        members.append(jnp.broadcast_to(member[:, :, None, None], s.shape))
        scores.append(jnp.where(members[-1], s, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    weights = jnp.where(jnp.concatenate(members, axis=-1), weights, 0)
    if pooling == "mean":
        weights = weights.mean(3, keepdims=True)
    by_part = jnp.split(weights, len(parts), axis=-1)

    def pooled(values: Sequence[Array]) -> Array:
        sums = (_product("bmkgi,bmike->bmkge", w.astype(x.dtype), x) for w, x in zip(by_part, values))
        total = functools.reduce(operator.add, sums)
        return total.reshape(*total.shape[:2], -1, total.shape[-1]).astype(values[0].dtype)

    core_keys = [keys[2] if len(keys) > 2 else keys[0] for keys, _ in parts]
    return [pooled(core_keys), pooled([keys[1] for keys, _ in parts])]


def _slots(x: Array, size: int) -> Array:
    """[B, M g, ...] to [B, M, g, ...]."""
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=wide(a, b))

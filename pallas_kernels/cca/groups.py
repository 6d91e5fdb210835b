"""Where the groups of a row lie: tokens of a document counted from its start, ``size`` to a group."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels import spmd, time_order


class Groups(NamedTuple):
    """The groups of rows of L tokens. M slots of ``size`` tokens each hold the end of at most one group.

    Under a mesh with time sharded, every device knows all of its rows' groups.

    Attributes:
        size: g.
        starts: int32 [B, L], the index in time at which the group of each token starts; before the row where
            its first tokens came in an earlier piece. With ``literal_boundary``, groups begin a token earlier
            here, and a query sees the last token of the newest core as well.
        ends: bool [B, L], whether a group that lies in the row as a whole ends with this token; None where
            the slots themselves are the groups.
        last: int32 [B, M], the index in time of the group's last token (of the slot's where no group ends).
        number: int32 [B, M], which group of its document it is.
        segment_ids: int32 [B, M], of the group, 0 where no group ends; None for groups in every slot.
    """

    size: int
    starts: Int[Array, "B L"]
    ends: Bool[Array, "B L"] | None
    last: Int[Array, "B M"]
    number: Int[Array, "B M"]
    segment_ids: Int[Array, "B M"] | None

    @classmethod
    def of(
        cls,
        batch: int,
        length: int,
        size: int,
        segment_ids: Int[Array, "B L"] | None,
        carried: Int[Array, " B"] | None = None,
        *,
        literal_boundary: bool = False,
    ) -> Groups:
        """Groups of ``segment_ids`` (None: one document, M = floor(L / g)), in the order of time in force.

        Args:
            batch, length, size: B, L and g.
            segment_ids: 0 for padding; the tokens of a document are contiguous.
            carried: tokens of segment 1 before this row, of a document that came in pieces.
        """
        time, shift = time_order.positions(length), int(literal_boundary)
        index = jnp.tile(time, (batch, 1))
        if segment_ids is None:
            last = index[:, : length // size * size].reshape(batch, -1, size)[:, :, -1]
            return cls(size, index - (index + shift) % size, None, last, last // size, None)
        before = jnp.zeros(batch, jnp.int32) if carried is None else carried
        before = jnp.where(segment_ids == 1, before[:, None], 0)
        number = number_in_document(segment_ids) + before
        ends = (segment_ids != 0) & ((number + 1) % size == 0) & (number + 1 - size >= before)
        slots = np.pad(time, (0, -length % size), mode="edge").reshape(-1, size)
        some = _at_ends(ends, jnp.ones_like(number), size) != 0
        last = jnp.where(some, _at_ends(ends, index, size), slots.max(1))
        of_group, ids = (_at_ends(ends, x, size) for x in (number // size, segment_ids))
        known = (index - (number + shift) % size, ends, last, of_group, ids)
        return cls(size, *(spmd.replicate_time(x) for x in known))

    def at_ends(self, x: Int[Array, "B L"]) -> Int[Array, "B M"]:
        """``x`` of the last token of each group; 0 where no group ends."""
        if self.ends is not None:
            return _at_ends(self.ends, x, self.size)
        slots = self.last.shape[1]
        return x[:, : slots * self.size].reshape(-1, slots, self.size)[:, :, -1]


def number_in_document(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """How many tokens of its document stand before each token; anything at padding."""
    length = segment_ids.shape[1]
    index = time_order.positions(length)
    ids = segment_ids[:, np.argsort(index)]  # in the order of time
    starts = ids != jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
    start = jax.lax.cummax(jnp.where(starts, jnp.arange(length, dtype=jnp.int32), 0), axis=1)
    return (jnp.arange(length, dtype=jnp.int32) - start)[:, index]


def _at_ends(ends: Array, x: Array, size: int) -> Int[Array, "B M"]:
    found = fill(jnp.where(ends, x, 0), size)  # at most one in a slot
    return found.reshape(found.shape[0], -1, size).sum(-1, dtype=jnp.int32)


def fill(x: Array, size: int) -> Array:
    """[B, L, ...] with zeros at the end up to a multiple of ``size``."""
    missing = -x.shape[1] % size
    return jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]) if missing else x

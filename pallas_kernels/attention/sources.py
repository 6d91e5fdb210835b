"""What a query may attend to: key sources, mask predicates, closed-form biases.

Masks are predicates on positions, never arrays of [Lq, Lk]: an implementation evaluates them on one block of
queries and keys at a time, and on the ranges of positions in a block to know which blocks matter at all.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # log-sum-exp of a row that sees nothing: like -inf, but differences of two stay finite


@dataclasses.dataclass(frozen=True)
class Mask:
    """Conjunction of predicates on (query position, key position); the default lets everything through.

    Attributes:
        causal: keys at or before the query, ``k <= q``.
        window: the last ``window`` keys including the query's own, ``q - k < window`` (it does not bound the
            future: combine it with ``causal``). A source can measure it to another place than the key's own,
            see ``Source.kv_window_positions``.

    A new predicate is a new field here, one line in :meth:`sees` and one in :meth:`may_see`.
    """

    causal: bool = False
    window: int | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"Mask.window={self.window}: a window holds at least the query itself, use >= 1."
            )

    @property
    def positional(self) -> bool:
        """Whether positions matter."""
        return self.causal or self.window is not None

    def sees(
        self,
        q: Int[Array, "#B Lq"],
        k: Int[Array, "#B Lk"],
        k_window: Int[Array, "#B Lk"] | None = None,
    ) -> Bool[Array, "_ Lq Lk"]:
        """The predicate on every pair of positions; the window is measured to ``k_window`` (None: ``k``)."""
        distance = q[:, :, None] - k[:, None, :]
        seen = jnp.ones(distance.shape, bool)
        if self.causal:
            seen &= distance >= 0
        if self.window is not None:
            reach = distance if k_window is None else q[:, :, None] - k_window[:, None, :]
            seen &= reach < self.window
        return seen

    def may_see(self, q_low: Array, q_high: Array, k_low: Array, k_high: Array) -> Array:
        """Whether a query position in [q_low, q_high] can see a key position in [k_low, k_high].

        ``k_high`` is the largest position that the window is measured to, where that is another.
        """
        seen = jnp.ones(jnp.broadcast_shapes(q_low.shape, k_low.shape), bool)
        if self.causal:
            seen &= k_low <= q_high
        if self.window is not None:
            seen &= q_low - k_high < self.window
        return seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """Keys and values that share one softmax with the other sources of a call.

    Attributes:
        k, v: [B, Lk, K, E]; K divides the number of query heads, query head h reads key head h * K // H.
        q_positions, kv_positions: int32 [B, Lq], [B, Lk], or None for the row index.
        kv_segment_ids: int32 [B, Lk]; a query sees keys of its own segment only, and segment 0 (padding)
            neither sees nor is seen. None: every query that is not padding sees these keys.
        kv_length: int32 [B], number of leading key slots that are in use; None for all.
        mask: predicate on the positions (static).
        kv_window_positions: int32 [B, Lk], at most the position of the key: what ``mask.window`` is measured
            to in its place, such as the start of a group of keys that leaves the window as one.
    """

    k: Float[Array, "B Lk K E"]
    v: Float[Array, "B Lk K E"]
    q_positions: Int[Array, "B Lq"] | None = None
    kv_positions: Int[Array, "B Lk"] | None = None
    kv_segment_ids: Int[Array, "B Lk"] | None = None
    kv_length: Int[Array, " B"] | None = None
    mask: Mask = dataclasses.field(default=Mask(), metadata={"static": True})
    kv_window_positions: Int[Array, "B Lk"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Alibi:
    """Adds ``-slopes[h] * (q_position - k_position)`` to the logits (Press et al. 2021, arXiv 2108.12409).

    The slopes are constants: they receive no gradient.
    """

    slopes: Float[Array, " H"]


def wide(*arrays: Array) -> jnp.dtype:
    """Dtype that products of ``arrays`` accumulate in: float32, or wider if one of them is."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


class Tokens(NamedTuple):
    """What masks need to know about a run of queries or keys, leading axis B or 1 (None: does not matter)."""

    positions: Int[Array, "B L"] | None = None
    segment_ids: Int[Array, "B L"] | None = None
    valid: Bool[Array, "B L"] | None = None
    window_positions: Int[Array, "B L"] | None = None


def tokens_of(
    source: Source, length: int, q_segment_ids: Int[Array, "B Lq"] | None, positional: bool
) -> tuple[Tokens, Tokens]:
    """Query tokens and key tokens of one source; ``positional`` says whether positions matter at all."""
    q_positions, kv_positions = source.q_positions, source.kv_positions
    slots = jnp.arange(source.k.shape[1], dtype=jnp.int32)[None]
    if not positional:
        q_positions = kv_positions = None
    else:
        q_positions = jnp.arange(length, dtype=jnp.int32)[None] if q_positions is None else q_positions
        kv_positions = slots if kv_positions is None else kv_positions
    valid = None if source.kv_length is None else slots < source.kv_length[:, None]
    keys = Tokens(kv_positions, source.kv_segment_ids, valid, source.kv_window_positions)
    return Tokens(q_positions, q_segment_ids), keys


def visible(mask: Mask, q: Tokens, kv: Tokens) -> Bool[Array, "_ Lq Lk"] | None:
    """Which pairs of a block take part in the softmax, B or 1 in front; None when all do."""
    seen = None
    if mask.positional:
        assert q.positions is not None and kv.positions is not None
        seen = mask.sees(q.positions, kv.positions, kv.window_positions)
    if q.segment_ids is not None:
        same = (q.segment_ids != 0)[:, :, None]
        if kv.segment_ids is not None:
            same &= q.segment_ids[:, :, None] == kv.segment_ids[:, None, :]
        seen = same if seen is None else seen & same
    if kv.valid is not None:
        valid = kv.valid[:, None, :]
        seen = valid if seen is None else seen & valid
    return seen


def may_meet(mask: Mask, q: Tokens, kv: Tokens) -> Bool[Array, "_ _ _"]:
    """Whether any query of a block can see any key of a block; never wrongly False.

    Every field of ``q`` and ``kv`` holds blocks, [B, N, block]. Segment ids are compared as ranges, which is
    tight for packed rows, whose ids ascend. Dimensions of the result may be 1.
    """
    seen = jnp.ones((1, 1, 1), bool)
    if mask.positional:
        assert q.positions is not None and kv.positions is not None
        low, high = q.positions.min(-1)[:, :, None], q.positions.max(-1)[:, :, None]
        last = kv.positions if kv.window_positions is None else kv.window_positions
        seen &= mask.may_see(low, high, kv.positions.min(-1)[:, None], last.max(-1)[:, None])
    if q.segment_ids is not None and kv.segment_ids is not None:
        (q_low, q_high), (k_low, k_high) = _real_range(q.segment_ids), _real_range(kv.segment_ids)
        seen &= (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    if kv.valid is not None:
        seen &= kv.valid.any(-1)[:, None]
    return seen


def _real_range(segment_ids: Int[Array, "B N M"]) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Smallest and largest id that is not padding; an empty range where all is padding."""
    largest = jnp.iinfo(jnp.int32).max
    return jnp.where(segment_ids == 0, largest, segment_ids).min(-1), segment_ids.max(-1)

"""The contract of a sequence mixer: one function for training, chunked prefill and one-token decode.

Axis letters used everywhere: B batch, L length, D model width, H heads, K key/value heads, E head dim of
attention, P head dim of an SSM, N state size, G groups, C channels, W convolution width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import time_order

State = Any  # a pytree of arrays; its shapes are fixed by (batch, max_len)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a mixer knows about its tokens besides their values.

    Build it with :meth:`create`, which brings segment ids into canonical form: 0 is padding, 1 is the
    segment that the carried state belongs to, 2, 3, ... are the segments that start in this piece. The real
    tokens of one segment are contiguous; padding stands before, after or between segments.

    Attributes:
        positions: position of each token in its document, int32 [B, L].
        segment_ids: canonical ids, int32 [B, L], or None when every token is real and continues the state.
        continues: whether the first real token belongs to the carried state, bool [B], or None for "yes".
        prefix: tokens that a mixer that can may read both ways (``layers/prefix_scan.py``), bool [B, L], or
            None for none.
        right_padded: each row is one whole segment, and what padding there is stands after it (static). A
            mixer may use it to be faster.
        key: PRNG key for dropout and the like, or None.
        deterministic: no dropout (static).
        sequence_axis: mesh axis along which time is sharded, or None (static).
        sequence_layout: order of the tokens along that axis, "contiguous" or "zigzag" (``time_order``;
            static). Values, positions and ids have been arranged: a layer that asks what comes before a
            token by its index, and not through an op, uses :meth:`count`.
    """

    positions: Int[Array, "B L"]
    segment_ids: Int[Array, "B L"] | None = None
    continues: Bool[Array, " B"] | None = None
    prefix: Bool[Array, "B L"] | None = None
    right_padded: bool = dataclasses.field(default=False, metadata={"static": True})
    key: Array | None = None
    deterministic: bool = dataclasses.field(default=True, metadata={"static": True})
    sequence_axis: str | None = dataclasses.field(default=None, metadata={"static": True})
    sequence_layout: str = dataclasses.field(default="contiguous", metadata={"static": True})

    @classmethod
    def create(
        cls,
        batch: int,
        length: int,
        *,
        positions: Int[Array, "B L"] | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
        previous_segment: Int[Array, " B"] | None = None,
        previous_position: Int[Array, " B"] | None = None,
        **static: Any,
    ) -> Context:
        """Canonical context of a piece of ``length`` tokens.

        Args:
            batch, length: B and L.
            positions: positions in the documents; counted from the segment starts when None.
            segment_ids: raw ids, 0 for padding; None means one segment without padding.
            previous_segment: raw id of the last real token before this piece; 0 (or None) for nothing before.
            previous_position: its position; -1 (or None) for nothing before.
            static: right_padded, prefix, key, deterministic, sequence_axis, sequence_layout.
        """
        before = jnp.full((batch,), -1, jnp.int32) if previous_position is None else previous_position
        if segment_ids is None:
            if positions is None:
                positions = before[:, None] + 1 + jnp.arange(length, dtype=jnp.int32)
            return cls(positions=positions, **static)
        runs, continues = canonical_segments(segment_ids, previous_segment)
        if positions is None:
            positions = positions_in_segments(runs, before)
        return cls(positions=positions, segment_ids=runs, continues=continues, **static)

    def arranged(self, layout: str) -> Context:
        """This context, made in the order of time, for tokens arranged in ``layout``."""
        if layout == self.sequence_layout:
            return self
        ids = None if self.segment_ids is None else time_order.arrange(self.segment_ids, layout)
        positions = time_order.arrange(self.positions, layout)
        return dataclasses.replace(self, positions=positions, segment_ids=ids, sequence_layout=layout)

    def take(self, places: Int[Array, "B K"]) -> Context:
        """The context of the tokens at ``places`` alone, which rise along each row."""

        def at(t: Array | None) -> Array | None:
            return None if t is None else jnp.take_along_axis(t, places, axis=1)

        ids, continues = at(self.segment_ids), self.continues
        if ids is not None and continues is not None:  # where none of the carried segment is left
            first = jnp.take_along_axis(ids, jnp.argmax(ids != 0, axis=1)[:, None], axis=1)[:, 0]
            continues = continues & (first <= 1)
        return dataclasses.replace(
            self,
            positions=jnp.take_along_axis(self.positions, places, axis=1),
            segment_ids=ids,
            continues=continues,
            prefix=at(self.prefix),
        )

    def count(self, flags: Bool[Array, "B L"]) -> Int[Array, "B L"]:
        """How many ``flags`` are set up to each token in time, its own included; int32."""
        in_time = time_order.restore(flags, self.sequence_layout)
        return time_order.arrange(jnp.cumsum(in_time, axis=1, dtype=jnp.int32), self.sequence_layout)

    def with_key(self, key: Array) -> Context:
        """The same context with another PRNG key."""
        return dataclasses.replace(self, key=key)

    def carried(self, state: State) -> State:
        """``state`` [B, ...] where the piece continues it, zeros in rows that start a new segment."""
        continues = self.continues
        if continues is None or state is None:
            return state
        return jax.tree.map(
            lambda s: jnp.where(continues.reshape(-1, *[1] * (s.ndim - 1)), s, jnp.zeros_like(s)), state
        )


def canonical_segments(
    segment_ids: Int[Array, "B L"], previous_segment: Int[Array, " B"] | None
) -> tuple[Int[Array, "B L"], Bool[Array, " B"]]:
    """Raw ids to runs: 0 padding, 1 the carried segment, 2, 3, ... new ones; and whether a row continues.

    A row of padding only continues (its state passes through unchanged). Without ``previous_segment`` the
    first run is 1 as well: the state is zero, so it makes no difference.
    """
    real = segment_ids != 0
    filled = _last_real(segment_ids, previous_segment)
    # Not `.at[:, 0].set(...)`: with time sharded, the XLA of jax 0.10.2 gets that update wrong.
    first = filled[:, :1] * 0 if previous_segment is None else previous_segment[:, None]
    before = jnp.concatenate([first, filled[:, :-1]], axis=1)
    # The first real token after nothing opens run 1; any other change of id opens the next run.
    change = real & (segment_ids != before) & (before != 0)
    runs = jnp.where(real, 1 + jnp.cumsum(change, axis=1, dtype=jnp.int32), 0)
    first_real = jnp.argmax(real, axis=1)
    first_run = jnp.take_along_axis(runs, first_real[:, None], axis=1)[:, 0]
    return runs, first_run <= 1


def _last_real(segment_ids: Int[Array, "B L"], previous: Int[Array, " B"] | None) -> Int[Array, "B L"]:
    """Id of the last real token at or before each position (``previous``, or 0, where there is none)."""
    length = segment_ids.shape[1]
    index = jnp.where(segment_ids != 0, jnp.arange(length), -1)
    last = jax.lax.cummax(index, axis=1)
    ids = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
    start = jnp.zeros_like(ids[:, 0]) if previous is None else previous
    return jnp.where(last >= 0, ids, start[:, None])


def positions_in_segments(runs: Int[Array, "B L"], previous_position: Int[Array, " B"]) -> Int[Array, "B L"]:
    """Position of each real token in its segment; run 1 counts on from ``previous_position``; padding 0."""
    length = runs.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    starts = (runs != 0) & (runs != jnp.concatenate([runs[:, :1] * 0, runs[:, :-1]], axis=1))
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    offset = jnp.where(runs == 1, previous_position[:, None] + 1, 0)
    return jnp.where(runs != 0, index - start + offset, 0).astype(jnp.int32)


@runtime_checkable
class SequenceMixer(Protocol):
    """Anything that mixes along time. See the module docstring for the axis letters.

    ``__call__`` serves training (``state=None``), chunked prefill (a state in, a state out, any L >= 1) and
    decoding (L = 1). A change of segment resets all memory. Padding neither writes, is read, nor is
    remembered. Bidirectional mixers (``causal = False``) return no state.
    """

    causal: bool

    def init_state(self, batch: int, max_len: int) -> State:
        """The empty state; its shapes are fixed by (batch, max_len)."""

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        """Mix ``x`` along L. The state returned is None exactly when ``state`` is None."""

    def flops_per_token(self, length: int) -> float:
        """Forward floating point operations per token at context ``length`` (2 per multiply-add)."""

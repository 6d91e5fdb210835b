"""What the forward and the backward kernel of flash attention share: operands, blocks, the masked logits.

Which blocks of keys a block of queries needs is known before the kernel starts, as two tables of numbers: the
grid walks over those blocks only, and skips what is left over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.sources import Mask, Tokens, may_meet
from pallas_kernels.mosaic import LANES, Interpret, dot, quotient


class Rows(NamedTuple):
    """What masks know about tokens, as the kernels read it: int32 [B or 1, 1, L], None where not needed.

    A query sees a key where their codes are equal.
    """

    positions: Int[Array, "B 1 L"] | None
    codes: Int[Array, "B 1 L"] | None
    window_positions: Int[Array, "B 1 L"] | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """Static description of one call, over whole blocks of ``rows`` queries and ``cols`` keys."""

    mask: Mask
    scale: float
    aligned: bool
    rows: int
    cols: int
    q_length: int
    kv_length: int
    out_dtype: Any
    interpret: Interpret

    @property
    def blocks(self) -> tuple[int, int]:
        """How many blocks of queries, and of keys."""
        return -(-self.q_length // self.rows), -(-self.kv_length // self.cols)

    @property
    def key_steps(self) -> int:
        """Blocks of keys that a block of queries needs at most."""
        return self._steps(self.rows, self.cols, self.blocks[1])

    @property
    def query_steps(self) -> int:
        """Blocks of queries that a block of keys needs at most."""
        return self._steps(self.cols, self.rows, self.blocks[0])

    def _steps(self, own: int, other: int, limit: int) -> int:
        if not (self.aligned and self.mask.causal and self.mask.window is not None):
            return limit
        return min(limit, (own + self.mask.window - 2) // other + 2)


def needed_blocks(
    call: Call, q_tokens: Tokens, kv_tokens: Tokens
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Which blocks of keys every block of queries needs, and the reverse: first, one past the last.

    Tables of [B or 1, blocks].
    """
    seen = may_meet(call.mask, _cut(q_tokens, call.rows), _cut(kv_tokens, call.cols))
    seen = jnp.broadcast_to(seen, (seen.shape[0], *call.blocks))

    def span(seen):  # along the last axis
        some = seen.any(-1)
        low = jnp.where(some, seen.argmax(-1), 0)
        high = jnp.where(some, seen.shape[-1] - seen[..., ::-1].argmax(-1), 0)
        return low.astype(jnp.int32), high.astype(jnp.int32)

    return span(seen), span(seen.swapaxes(1, 2))


def _cut(tokens: Tokens, size: int) -> Tokens:
    """Every field in blocks [B, N, size]; the last token repeated fills up the last one."""

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), mode="edge")
        return x.reshape(x.shape[0], -1, size)

    return jax.tree.map(cut, tokens)


def token_rows(call: Call, q: Tokens, kv: Tokens) -> tuple[Rows, Rows]:
    """Positions unless they are the row index, codes unless every query sees every key, and what the window
    is measured to unless that is the positions; padded."""
    positions: list[Array | None] = [None, None]
    if q.positions is not None and kv.positions is not None and not call.aligned:
        positions = [q.positions, kv.positions]
    codes: list[Array | None] = [None, None]
    if q.segment_ids is not None or kv.valid is not None:
        q_ids = jnp.ones((1, call.q_length), jnp.int32) if q.segment_ids is None else q.segment_ids
        if kv.segment_ids is None:
            q_codes, kv_codes = jnp.where(q_ids == 0, -1, 1), jnp.ones((1, call.kv_length), jnp.int32)
        else:
            q_codes, kv_codes = jnp.where(q_ids == 0, -1, q_ids), kv.segment_ids
        codes = [q_codes, kv_codes if kv.valid is None else jnp.where(kv.valid, kv_codes, -2)]

    def row(x: Array | None, block: int) -> Array | None:
        if x is None:
            return None
        return jnp.pad(x.astype(jnp.int32), ((0, 0), (0, -x.shape[1] % block)))[:, None]

    q_rows, kv_rows = (
        [row(x[i], b) for x in (positions, codes)] for i, b in ((0, call.rows), (1, call.cols))
    )
    return Rows(*q_rows), Rows(kv_rows[0], kv_rows[1], row(kv.window_positions, call.cols))


class Axis(NamedTuple):
    """Tokens of one side of a tile, along sublanes [n, 1] or along lanes [1, n]."""

    place: Array  # row index
    positions: Array | None
    codes: Array | None
    window_positions: Array | None

    @classmethod
    def along_lanes(cls, rows: Rows, start: Array, size: int) -> Axis:
        """``size`` of ``rows`` from ``start``, as a row [1, size]."""
        place = start + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
        return cls(place, *(None if ref is None else ref[...] for ref in rows))

    @classmethod
    def along_sublanes(cls, rows: Rows, columns: Sequence, start: Array, size: int) -> Axis:
        """``columns``: scratch [n, LANES] that holds each of ``rows`` as :func:`as_column`."""
        place = start + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        left = iter(columns)
        return cls(place, *(None if ref is None else next(left)[:, :1] for ref in rows))


def logits(call: Call, products: Float[Array, "m n"], q: Axis, kv: Axis, slopes: Any) -> Float[Array, "m n"]:
    """``products`` of queries and keys, scaled, biased, and -inf where the query does not see the key.

    ``slopes``: ref of the head's ALiBi slope, or None.
    """
    s = products * call.scale
    q_positions, kv_positions = (t.place if t.positions is None else t.positions for t in (q, kv))
    distance = q_positions - kv_positions
    if slopes is not None:
        s -= slopes[:, :1] * distance.astype(jnp.float32)
    conditions: list[Array] = []
    if call.mask.causal:
        conditions.append(distance >= 0)
    if call.mask.window is not None:
        reach = distance if kv.window_positions is None else q_positions - kv.window_positions
        conditions.append(reach < call.mask.window)
    if q.codes is not None and kv.codes is not None:
        conditions.append(q.codes == kv.codes)
    if call.kv_length % call.cols:
        conditions.append(jnp.broadcast_to(kv.place < call.kv_length, s.shape))
    if not conditions:
        return s
    seen = conditions[0]
    for condition in conditions[1:]:
        seen &= condition
    return jnp.where(seen, s, -jnp.inf)


def as_column(row: Array) -> Array:
    """[1, n] to [n, LANES], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def scores(a: Array, b: Array) -> Float[Array, "m n"]:
    """Products of the rows of ``a`` with the rows of ``b``."""
    return dot(a, b, (1, 1))


class Operands(NamedTuple):
    """What a kernel reads, over whole blocks; also, in the same places, how it is cut, or the refs to it."""

    q: Any  # [B, H, Lq, E]
    k: Any  # [B, K, Lk, E]
    v: Any
    q_rows: Rows
    kv_rows: Rows
    slopes: Any = None  # [H, 1, LANES]
    d_out: Any = None  # like q
    lse: Any = None  # [B, H, 1, Lq]
    delta: Any = None

    def specs(self, call: Call, q_index: Callable, kv_index: Callable) -> Operands:
        """``q_index(*grid indices, *spans)`` gives (batch, head, block) of the queries; likewise for keys."""
        width = self.q.shape[3]

        def tokens(x, size, index):
            def block(*ids):
                b, _, i = index(*ids)
                return (b if x.shape[0] > 1 else 0, 0, i)

            return pl.BlockSpec((None, 1, size), block)

        def statistics(*ids):
            b, h, i = q_index(*ids)
            return (b, h, 0, i)

        def by_head(*ids):
            return (q_index(*ids)[1], 0, 0)

        by_query = pl.BlockSpec((None, None, call.rows, width), lambda *ids: (*q_index(*ids), 0))
        by_key = pl.BlockSpec((None, None, call.cols, width), lambda *ids: (*kv_index(*ids), 0))
        by_row = pl.BlockSpec((None, None, 1, call.rows), statistics)
        return Operands(
            by_query,
            by_key,
            by_key,
            jax.tree.map(lambda x: tokens(x, call.rows, q_index), self.q_rows),
            jax.tree.map(lambda x: tokens(x, call.cols, kv_index), self.kv_rows),
            None
            if self.slopes is None
            else pl.BlockSpec((None, 1, LANES), lambda *ids: (q_index(*ids)[1], 0, 0)),
            None if self.d_out is None else by_query,
            None if self.lse is None else by_row,
            None if self.delta is None else by_row,
        )


def query_walk(given: Operands) -> tuple[Callable, Callable]:
    """Indices for :meth:`Operands.specs` where each block of queries walks over its blocks of keys."""
    group = given.q.shape[1] // given.k.shape[1]

    def own(b, h, i, j, *_):
        return b, h, i

    def keys(b, h, i, j, *span):
        return b, quotient(h, group), within(span, b, i, j)[0]

    return own, keys


def columns_of(rows: Rows, size: int) -> list:
    """Scratch that holds ``rows`` as columns, for :meth:`Axis.along_sublanes`."""
    return [pltpu.VMEM((size, LANES), x.dtype) for x in jax.tree.leaves(rows)]


def split_refs(places: Any, refs: Sequence) -> tuple[Operands, list]:
    """The first refs in their ``places`` (the tree structure of the operands), and the others."""
    n = places.num_leaves
    return jax.tree.unflatten(places, refs[:n]), list(refs[n:])


Span = tuple[Int[Array, "b i"], Int[Array, "b i"]]


def within(span: tuple[Any, Any], b: Array, i: Array, step: Array) -> tuple[Array, Array]:
    """Which block comes at ``step``, kept within those that are needed, and whether it is one of them.

    ``span``: refs of a :data:`Span`.
    """
    low, high = (x[b if x.shape[0] > 1 else 0, i] for x in span)
    return jnp.minimum(low + step, jnp.maximum(high - 1, low)), low + step < high

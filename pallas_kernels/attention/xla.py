"""One source of blockwise attention in plain XLA, forward and backward: memory O(L), never [Lq, Lk].

A block of queries walks over blocks of keys with the online softmax (Milakov & Gimelshein 2018, arXiv
1805.02867; Dao et al. 2022, arXiv 2205.14135). Loop bounds come from what the masks can let through, so
causal, windowed and packed rows pay for the blocks they need.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.sources import MASKED, Mask, Tokens, wide
from pallas_kernels.attention.tile import Keys, Partial, Scoring, gradients, softmax_part
from pallas_kernels.attention.tiling import Tiling

BLOCK = 512  # queries, and keys, of a tile
MAX_KEYS = 8192  # keys of a tile when there are few queries

Out = tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"]]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static description of one call.

    Attributes:
        aligned: all positions are the row index.
        block: queries, and keys, of a tile.
        implementation: of the two functions below, see ``blockwise.py``.
    """

    mask: Mask
    scale: float
    aligned: bool
    out_dtype: Any
    block: int = BLOCK
    implementation: str | None = None

    def key_block(self, q_length: int, kv_length: int) -> int:
        """Keys of a tile. It holds about block^2 logits a head, so few queries take many keys."""
        few = self.block * self.block // min(q_length, self.block)
        return min(kv_length, max(self.block, min(few, MAX_KEYS)))

    def one_tile(self, q_length: int, kv_length: int) -> bool:
        """Whether no loop is needed."""
        return q_length <= self.block and kv_length <= self.key_block(q_length, kv_length)

    def tiling(self, q: Array, k: Array, q_tokens: Tokens, kv_tokens: Tokens) -> Tiling:
        """Tiles of queries [B, Lq, ..] and keys [B, Lk, ..] that do not fit into one."""
        lengths = q.shape[1], k.shape[1]
        block = min(self.block, lengths[0]), self.key_block(*lengths)
        return Tiling.of(self.mask, block, *lengths, q_tokens, kv_tokens)

    def ranges(self, q_length: int, kv_length: int) -> list[tuple[slice, slice]]:
        """Rows of one tile with the keys they can see; causal rows in four steps, to skip the future."""
        if not (self.aligned and self.mask.causal):
            return [(slice(0, q_length), slice(0, kv_length))]
        step, window = max(1, self.block // 4), self.mask.window
        found = []
        for start in range(0, q_length, step):
            stop = min(start + step, q_length)
            last = min(stop, kv_length)
            first = 0 if window is None else min(max(0, start - window + 1), last - 1)
            found.append((slice(start, stop), slice(first, last)))
        return found


def forward(spec: Spec, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes) -> Out:
    """Output [B, Lq, H, E] in ``spec.out_dtype`` and log-sum-exp [B, H, Lq] in float32."""
    scoring = Scoring(spec.mask, spec.scale, slopes)
    if spec.one_tile(q.shape[1], k.shape[1]):
        outs, lses = [], []
        for rows, cols in spec.ranges(q.shape[1], k.shape[1]):
            keys = Keys(k[:, cols], v[:, cols], _cut(kv_tokens, cols))
            part = softmax_part(q[:, rows], _cut(q_tokens, rows), keys, scoring)
            out, lse = part.finish(rows.stop - rows.start)
            outs.append(out)
            lses.append(lse)
        return jnp.concatenate(outs, axis=1).astype(spec.out_dtype), jnp.concatenate(lses, axis=2)

    tiles = spec.tiling(q, k, q_tokens, kv_tokens)

    def query_block(block):
        q, q_tokens, low, high = block

        def key_block(j, so_far):
            return so_far.join(softmax_part(q, q_tokens, tiles.keys(k, v, kv_tokens, j), scoring))

        out, lse = jax.lax.fori_loop(low, high, key_block, Partial.empty(q, k)).finish(q.shape[1])
        return out.astype(spec.out_dtype), lse

    blocks = (tiles.split(q, 1), tiles.split_tokens(q_tokens), tiles.low, tiles.high)
    out, lse = jax.lax.map(query_block, blocks)
    return tiles.join(out, 1), tiles.join(lse, 2)


def backward(
    spec: Spec, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes, lse, d_out, delta
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B Lk K E"], Float[Array, "B Lk K E"]]:
    """dq, dk, dv in float32, given ``lse`` of the whole softmax and ``blockwise.row_delta``."""
    scoring = Scoring(spec.mask, spec.scale, slopes)
    dk, dv = jnp.zeros(k.shape, wide(q, k)), jnp.zeros(v.shape, wide(q, v))
    if spec.one_tile(q.shape[1], k.shape[1]):
        dqs = []
        for rows, cols in spec.ranges(q.shape[1], k.shape[1]):
            keys = Keys(k[:, cols], v[:, cols], _cut(kv_tokens, cols))
            known = (d_out[:, rows], lse[:, :, rows], delta[:, :, rows])
            dq, dk_part, dv_part = gradients(q[:, rows], *known, _cut(q_tokens, rows), keys, scoring)
            dk, dv = dk.at[:, cols].add(dk_part), dv.at[:, cols].add(dv_part)
            dqs.append(dq)
        return jnp.concatenate(dqs, axis=1), dk, dv

    tiles = spec.tiling(q, k, q_tokens, kv_tokens)

    def query_block(key_sums, block):
        q, d_out, lse, delta, q_tokens, low, high = block

        def key_block(j, sums):
            dq, dk, dv = sums
            keys = tiles.keys(k, v, kv_tokens, j)
            dq_part, dk_part, dv_part = gradients(q, d_out, lse, delta, q_tokens, keys, scoring)
            return dq + dq_part, tiles.add(dk, dk_part, j), tiles.add(dv, dv_part, j)

        start = (jnp.zeros(q.shape, wide(q, k)), *key_sums)
        dq, dk, dv = jax.lax.fori_loop(low, high, key_block, start)
        return (dk, dv), dq

    # The rows that fill up the last block get the probability exp(-inf) = 0.
    known = (tiles.split(d_out, 1), tiles.split(lse, 2, fill=-MASKED), tiles.split(delta, 2))
    blocks = (tiles.split(q, 1), *known, tiles.split_tokens(q_tokens), tiles.low, tiles.high)
    (dk, dv), dq = jax.lax.scan(query_block, (dk, dv), blocks)
    return tiles.join(dq, 1), dk, dv


def _cut(tokens: Tokens, part: slice) -> Tokens:
    return jax.tree.map(lambda x: x[:, part], tokens)

"""What the forward and the backward SSD kernels share: the blocks they walk over, and the decays of a chunk.

Time lies in lanes: x is [B, H*P, L] and everything that belongs to a head and a token is [B, H, L], so that
scaling the P channels of a head is a cheap broadcast over sublanes. A grid step is one chunk of Q tokens of
one block of K heads, all of one group; chunks are walked innermost, with the state [K*P, N] in scratch.
Matrices over pairs of tokens stand transposed, [j, i]: token j is written, token i reads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up; hashable, the static argument of the kernels.

    Attributes:
        batch, chunks, heads, headdim, groups, d_state: sizes of the call (headdim and length as padded).
        chunk: Q. block, backward_block: K, heads a grid step, forward and backward; divide the heads of a
            group.
        packed: whether resets are given.
    """

    batch: int
    chunks: int
    heads: int
    headdim: int
    groups: int
    d_state: int
    chunk: int
    block: int
    backward_block: int
    packed: bool
    interpret: mosaic.Interpret = False

    def backward(self) -> Plan:
        """The plan of the backward kernels, which take another number of heads at once."""
        return dataclasses.replace(self, block=self.backward_block)

    @property
    def rows(self) -> int:
        """Channels a grid step, K*P."""
        return self.block * self.headdim

    @property
    def head_blocks(self) -> int:
        """Grid steps over the heads."""
        return self.heads // self.block

    @property
    def group_blocks(self) -> int:
        """Head blocks in a group."""
        return self.head_blocks // self.groups

    @property
    def flat_groups(self) -> bool:
        """B and C as [B, 1, L, G*N], else [B, G, L, N]: a block of N lanes is legal only if whole tiles."""
        return self.groups > 1 and self.d_state % mosaic.LANES == 0

    def split_heads(self, t: jax.Array) -> jax.Array:
        """[B, H, L] -> [B, H/K, K, L]: any number of heads is a legal block of its own axis."""
        return t.reshape(t.shape[0], self.head_blocks, self.block, t.shape[2])

    def specs(self, reverse: bool = False) -> dict[str, pl.BlockSpec]:
        """Block specifications by what they hold; ``reverse`` walks the chunks from the last."""
        rows, Q, N, K = self.rows, self.chunk, self.d_state, self.block

        def at(c):
            return self.chunks - 1 - c if reverse else c

        def group(b, h, c):
            g = mosaic.quotient(h, self.group_blocks)
            return (b, 0, at(c), g) if self.flat_groups else (b, g, at(c), 0)

        return {
            "channels": pl.BlockSpec((None, rows, Q), lambda b, h, c: (b, h, at(c))),  # x, y [B, H*P, L]
            "heads": pl.BlockSpec((None, None, K, Q), lambda b, h, c: (b, h, 0, at(c))),  # [B, H/K, K, L]
            "group": pl.BlockSpec((None, None, Q, N), group),  # B, C
            "group_parts": pl.BlockSpec((None, None, Q, N), lambda b, h, c: (b, h, at(c), 0)),
            "state": pl.BlockSpec((None, rows, N), lambda b, h, c: (b, h, 0)),  # [B, H*P, N]
            "starts": pl.BlockSpec((None, None, rows, N), lambda b, h, c: (b, at(c), h, 0)),
            "head": pl.BlockSpec((None, K, 1), lambda b, h, c: (h, 0, 0)),  # D [H/K, K, 1]
            "head_batch": pl.BlockSpec((None, None, K, 1), lambda b, h, c: (b, h, 0, 0)),
            "counts": pl.BlockSpec((None, 1, Q), lambda b, h, c: (b, 0, at(c))),
        }


# Blocks, their second buffers and the compiler's temporaries; v5p has 64 MiB, v5e and v6e 128.
VMEM_LIMIT_BYTES = 48 * mosaic.MiB
LOG2_E = math.log2(math.e)


class Decays(NamedTuple):
    """Decays of one chunk, with alpha the inclusive cumulative sum of its log decays."""

    bits: jax.Array  # [K, Q] alpha / log 2, so that a power of two is all there is to compute of a pair
    bits_column: jax.Array  # [Q, K]
    from_start: jax.Array  # [K, Q] e^(alpha_i), 0 behind a reset
    to_end: jax.Array  # [K, Q] e^(alpha_Q - alpha_j), 0 before a reset
    through: jax.Array  # [K, 1] e^(alpha_Q), 0 if there is a reset

    def within(self, head: int) -> jax.Array:
        """e^(alpha_i - alpha_j) [j, i] for j <= i, at most 1; the rest is for :func:`visible` to mask."""
        row, column = self.bits[head : head + 1], self.bits_column[:, head : head + 1]
        return jnp.exp2(jnp.minimum(row - column, 0.0))


def cumulative(t: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Inclusive sums over tokens, from the first or from the last, of t [K, Q] float32."""
    j, i = _pairs(t.shape[1])
    return mosaic.dot(t, (j <= i).astype(jnp.float32), (1, 1 if reverse else 0))


def visible(chunk: int, counts: jax.Array | None) -> jax.Array:
    """[j, i] bool: j <= i and no reset between; ``counts`` [1, Q] int32: resets so far in this chunk."""
    j, i = _pairs(chunk)
    if counts is None:
        return j <= i
    by_lane = jnp.broadcast_to(counts, (chunk, chunk))
    return (j <= i) & (by_lane == by_lane.T)


def decays(alpha: jax.Array, counts: jax.Array | None) -> Decays:
    """``alpha`` [K, Q], the cumulative log decays; ``counts`` as for :func:`visible`."""
    end = alpha.shape[1] - 1
    last = alpha[:, end:]
    from_start, to_end, through = jnp.exp(alpha), jnp.exp(last - alpha), jnp.exp(last)
    if counts is not None:
        resets = counts[:, end:]
        from_start = jnp.where(counts == 0, from_start, 0.0)
        to_end = jnp.where(counts == resets, to_end, 0.0)
        through = jnp.where(resets == 0, through, 0.0)
    bits = alpha * LOG2_E
    return Decays(bits, bits.T, from_start, to_end, through)


def _pairs(chunk: int) -> tuple[jax.Array, jax.Array]:
    """The numbers j and i of the two tokens of every pair, [j, i]."""
    j, i = (jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
    return j, i


def by_head(t: jax.Array, block: int) -> jax.Array:
    """[K*P, Q] -> float32 [K, P, Q]."""
    return t.astype(jnp.float32).reshape(block, -1, t.shape[1])


def over_channels(t: jax.Array, like: jax.Array, dtype) -> jax.Array:
    """[K, P, Q] times [K, Q], as a matrix operand [K*P, Q]."""
    return (t * like[:, None, :]).reshape(-1, t.shape[2]).astype(dtype)


def through(R: jax.Array, decay: Decays) -> jax.Array:
    """What is left of the state R [K*P, N] at the end of the chunk (and, of a cotangent, at its start)."""
    return (by_head(R, decay.bits.shape[0]) * decay.through[:, :, None]).reshape(R.shape)

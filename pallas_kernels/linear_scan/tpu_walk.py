"""How the linear scan goes through [B, L, D] on TPU: blocks of tokens and channels, tiles of eight tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import tuning
from pallas_kernels.linear_scan.tpu_tile import Walk
from pallas_kernels.mosaic import LANES, SUBLANES, MiB
from pallas_kernels.planes import Planes

VMEM = 12 * MiB  # for blocks: v5e and v5p give a kernel 16 MiB


def block_sizes(length: int, channels: int, dtype: DTypeLike, arrays: int) -> tuple[int, int]:
    """Tokens and channels of a block: whole tiles, or all channels there are.

    ``arrays`` of ``dtype`` are read or written by block: of the backward's five, fewer tokens fit than of the
    forward's three.
    """
    sizes = tuning.blocks(
        "linear_scan", {"L": length, "D": channels}, dtype, {"tokens": 512, "channels": 512}
    )
    width = pl.cdiv(channels, pl.cdiv(channels, sizes["channels"]))  # of blocks as even as can be
    lanes = pl.cdiv(width, LANES) * LANES
    width = channels if lanes >= channels else lanes
    fit = VMEM // (2 * arrays * jnp.dtype(dtype).itemsize * lanes)  # two buffers each
    tokens = min(sizes["tokens"], fit, pl.cdiv(length, SUBLANES) * SUBLANES)
    return max(tokens // SUBLANES, 1) * SUBLANES, width


class Tile(NamedTuple):
    """Eight rows of a block, from ``row``; ``position`` [8, D'] of their tokens in the sequence."""

    row: jax.Array
    position: jax.Array

    @property
    def rows(self):
        """Of the block."""
        return pl.ds(self.row, SUBLANES)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a kernel walks [B, L, D]: blocks of ``rows`` tokens and ``width`` channels, in ``walk``'s order."""

    walk: Walk
    shape: tuple[int, int, int]
    rows: int
    width: int
    constant: bool  # the same decays for every token
    masked: bool  # rows beyond the sequence are to be kept out

    @property
    def time_blocks(self) -> int:
        """Blocks along time, the last perhaps not full."""
        return pl.cdiv(self.shape[1], self.rows)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Batch, blocks of channels, blocks of time."""
        return self.shape[0], pl.cdiv(self.shape[2], self.width), self.time_blocks

    def time(self, step: jax.Array) -> jax.Array:
        """The time block of a step of the grid."""
        return self.time_blocks - 1 - step if self.walk.backward else step

    def tokens(self) -> pl.BlockSpec:
        """Of [B, L, D]."""
        return pl.BlockSpec((None, self.rows, self.width), lambda b, d, t: (b, self.time(t), d))

    def tokens_around(self, after: bool) -> pl.BlockSpec:
        """The eight tokens after, or before, a block of tokens; at the ends any."""
        tiles_a_block, last = self.rows // SUBLANES, pl.cdiv(self.shape[1], SUBLANES) - 1

        def index(b, d, t):
            tile = self.time(t) * tiles_a_block + (tiles_a_block if after else -1)
            return b, jnp.clip(tile, 0, last), d

        return pl.BlockSpec((None, SUBLANES, self.width), index)

    def state(self) -> pl.BlockSpec:
        """Of [B, 1, D]."""
        return pl.BlockSpec((None, 1, self.width), lambda b, d, t: (b, 0, d))

    def channels(self) -> pl.BlockSpec:
        """Of [1, D]."""
        return pl.BlockSpec((1, self.width), lambda b, d, t: (0, d))

    def decays(self) -> pl.BlockSpec:
        """Of [B, L, D], or of [1, D] where they are the same for every token."""
        return self.channels() if self.constant else self.tokens()

    def walk_block(self, body: Callable[[Tile, Planes], Planes], carry: Planes) -> Planes:
        """``carry = body(tile, carry)`` over the tiles of a block, in order."""
        start, count = self.time(pl.program_id(2)) * self.rows, self.rows // SUBLANES

        def step(i, carry):
            row = pl.multiple_of((count - 1 - i if self.walk.backward else i) * SUBLANES, SUBLANES)
            position = start + row + jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, self.width), 0)
            return body(Tile(row, position), carry)

        return jax.lax.fori_loop(0, count, step, carry)

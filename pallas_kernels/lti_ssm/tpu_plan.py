"""How the chunked recurrence of ``lti_ssm/xla.py`` is cut up for TPU.

For each of H channels the tokens of all rows of the batch stand as a matrix [C*B, Q]: a chunk of Q tokens in
lanes, chunks outermost. The system's tables [Q, S] then multiply hundreds of chunks at once. A grid step is a
block of chunks of a block of channels; blocks of time are walked innermost, with the state in scratch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import LANES, SUBLANES, MiB

VMEM_LIMIT_BYTES = 48 * MiB
# What fits with room to spare: states of one channel, as table columns and as rows of a batch.
MAX_STATES, MAX_BATCH_STATES = 512, 2**16


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a call; hashable, the static argument of the kernels.

    Attributes:
        batch, heads: B and H. d_state: S, the real and the imaginary parts of the states.
        chunk: Q, tokens. chunks: that hold tokens of the call. block_chunks: chunks a grid step.
        block: channels a grid step; divides H.
        packed: whether resets are given. tail: whether the last tokens of a row may fill part of a chunk.
    """

    batch: int
    heads: int
    d_state: int
    chunk: int
    chunks: int
    block_chunks: int
    block: int
    packed: bool
    tail: bool
    interpret: mosaic.Interpret = False

    @property
    def time_blocks(self) -> int:
        """Blocks of chunks, the last perhaps not full."""
        return pl.cdiv(self.chunks, self.block_chunks)

    @property
    def all_chunks(self) -> int:
        """With those that fill up the last block."""
        return self.time_blocks * self.block_chunks

    @property
    def rows(self) -> int:
        """Chunks of all rows of the batch in a grid step."""
        return self.block_chunks * self.batch

    @property
    def tiles(self) -> int:
        """Of eight tokens in a chunk."""
        return self.chunk // SUBLANES

    @property
    def jumps(self) -> int:
        """Steps of the scan over a block's chunks, one at least."""
        return max(1, (self.block_chunks - 1).bit_length())

    def specs(self, backward: bool) -> dict[str, pl.BlockSpec]:
        """Blocks by kind of array; ``backward`` walks the blocks of time from the last to the first."""

        def time(t):
            return self.time_blocks - 1 - t if backward else t

        def by_channel(*shape: int) -> pl.BlockSpec:
            return pl.BlockSpec((self.block, *shape), lambda h, t, *_: (h, *[0] * len(shape)))

        return {
            "tokens": pl.BlockSpec((self.block, self.rows, self.chunk), lambda h, t, *_: (h, time(t), 0)),
            "code": pl.BlockSpec((self.rows, self.chunk), lambda h, t, *_: (time(t), 0)),
            "links": pl.BlockSpec((self.rows, self.d_state), lambda h, t, *_: (time(t), 0)),
            "kernel": by_channel(1, self.chunk),
            "factors": by_channel(Factors.count(self.tiles), self.d_state),
            "jumps": by_channel(self.jumps, self.d_state),
            "state": by_channel(self.batch, self.d_state),
            "tail": by_channel(self.batch, self.chunk),
            "starts": pl.BlockSpec(
                (self.block, None, self.batch, self.d_state), lambda h, t, *_: (h, time(t), 0, 0)
            ),
        }


class Factors(NamedTuple):
    """Where the factors of the tables stand in an array [.., 16 + Q/8 + 1, S] (see ``tpu_tile``)."""

    write: slice  # A^7 B .. B
    read: slice  # C A .. C A^8
    high: slice  # A^0, A^8 .. A^(Q-8)
    through: slice  # A^Q

    @classmethod
    def of(cls, tiles: int) -> Factors:
        """For chunks of ``tiles`` tiles of eight tokens."""
        high = 2 * SUBLANES + tiles
        return cls(
            slice(0, SUBLANES),
            slice(SUBLANES, 2 * SUBLANES),
            slice(2 * SUBLANES, high),
            slice(high, high + 1),
        )

    @classmethod
    def count(cls, tiles: int) -> int:
        """Rows in all."""
        return cls.of(tiles).through.stop


def make_plan(u: tuple[int, ...], d_state: int, packed: bool, interpret: mosaic.Interpret) -> Plan:
    """``u``: the shape [B, L, H]; ``d_state``: N."""
    batch, length, heads = u
    half = d_state if interpret else -(-d_state // (LANES // 2)) * (LANES // 2)
    shape = {"B": batch, "L": length, "H": heads, "N": d_state}
    rows = max(SUBLANES, 512 * LANES // max(2 * half, LANES))
    together = min(4 * LANES // max(2 * half, LANES), 2048 // max(rows, batch))
    default = {"chunk": LANES, "rows": rows, "heads": max(1, together)}
    sizes = tuning.blocks("lti_ssm", shape, jnp.float32, default)
    tile = SUBLANES if interpret else LANES
    chunk = min(-(-sizes["chunk"] // tile) * tile, -(-length // tile) * tile)
    chunks = -(-length // chunk)
    aligned = 1 if interpret else SUBLANES // math.gcd(batch, SUBLANES)  # chunks in whole tiles
    blocks = -(-chunks * batch // max(sizes["rows"], batch))
    block_chunks = -(-chunks // blocks)
    block_chunks += -block_chunks % aligned
    block = next(k for k in range(min(heads, sizes["heads"]), 0, -1) if heads % k == 0)
    tail = packed or length % chunk != 0
    return Plan(batch, heads, 2 * half, chunk, chunks, block_chunks, block, packed, tail, interpret)


def to_rows(plan: Plan, t: jax.Array) -> jax.Array:
    """[B, L, ...] -> [..., C*B, Q], zeros behind the end; of one more axis at most."""
    tokens = plan.all_chunks * plan.chunk - t.shape[1]
    t = jnp.pad(t, [(0, 0), (0, tokens)] + [(0, 0)] * (t.ndim - 2))
    t = t.reshape(plan.batch, plan.all_chunks, plan.chunk, *t.shape[2:])
    t = jnp.moveaxis(t, -1, 0) if t.ndim == 4 else t
    t = jnp.swapaxes(t, -3, -2)
    return t.reshape(*t.shape[:-3], -1, plan.chunk)


def from_rows(plan: Plan, t: Float[Array, "H rows Q"], length: int) -> Float[Array, "B L H"]:
    """Back from the kernels' order of chunks; tokens beyond ``length`` are dropped."""
    t = t.reshape(plan.heads, plan.all_chunks, plan.batch, plan.chunk).transpose(2, 1, 3, 0)
    return t.reshape(plan.batch, -1, plan.heads)[:, :length]


class Resets(NamedTuple):
    """Where states end, as the kernels read it.

    Attributes:
        code: of every token, 2 r + e: r resets so far in its chunk, e = 1 if it has the chunk's last.
        links: of every chunk, in every lane, 2 R + c: R resets before it, c = 1 if there is none in it.
        most: resets in a chunk of each block of time, at most.
    """

    code: Int[Array, "rows Q"]
    links: Int[Array, "rows S"]
    most: Int[Array, " T"]


def resets(plan: Plan, start: Int[Array, "B L"]) -> Resets:
    """``start`` as in ``compact.Compact``."""
    reset = start == jnp.arange(start.shape[1], dtype=start.dtype)
    reset = to_rows(plan, reset.astype(jnp.int32))
    here = jnp.cumsum(reset, axis=-1)
    by_chunk = here[:, -1].reshape(plan.all_chunks, plan.batch)
    before = jnp.cumsum(by_chunk, axis=0) - by_chunk
    links = (2 * before + (by_chunk == 0)).reshape(-1, 1)
    return Resets(
        2 * here + (here == here[:, -1:]),
        jnp.broadcast_to(links, (links.shape[0], plan.d_state)),
        jnp.max(by_chunk.reshape(plan.time_blocks, -1), axis=1),
    )

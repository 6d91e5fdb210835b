"""How the selective scan's TPU kernels go through their arrays: blocks, tiles of eight tokens, columns.

Channels lie in lanes. A block is [T, W] of tokens and channels; the state of its channels is [N, W], with N
in sublanes. What a token has N of (B, C) comes as [N, L], time in lanes: its column is spread over lanes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import LANES, SUBLANES, MiB, quotient, remainder
from pallas_kernels.planes import Planes

BLOCKS = 12 * MiB  # two buffers of what has a row for every token
VMEM = 48 * MiB  # of the 64 that a core of v5p has
SPILLS = 8 * MiB
LOG2_E = math.log2(math.e)


class Sizes(NamedTuple):
    """Tokens and channels of a block; ``lanes``: channels worked on at once, few enough for registers."""

    tokens: int
    channels: int
    lanes: int


def block_sizes(length: int, channels: int, d_state: int, complex: bool, dtype: DTypeLike) -> Sizes:
    """For ``channels`` of a group, a multiple of 128 or few enough to be one block; ``dtype`` of x."""
    lanes = (128 if complex else 512) * 16 // d_state
    default = {"tokens": 256, "channels": 1536, "lanes": max(lanes, LANES)}
    shape = {"L": length, "E": channels, "N": d_state}
    sizes = tuning.blocks("selective_scan", shape, dtype, default)
    width = lanes = channels
    if channels % LANES == 0:
        width = _dividing(channels, sizes["channels"])
        lanes = _dividing(width, sizes["lanes"])
    fit = BLOCKS // (2 * 5 * 4 * pl.cdiv(width, LANES) * LANES)  # two buffers of five float32 arrays
    tokens = min(sizes["tokens"], fit, pl.cdiv(length, LANES) * LANES)
    return Sizes(max(tokens // LANES, 1) * LANES, width, lanes)


def _dividing(channels: int, most: int) -> int:
    """The largest multiple of 128, ``most`` at most, that divides ``channels``."""
    tiles = channels // LANES
    return LANES * max(n for n in range(1, tiles + 1) if tiles % n == 0 and (n == 1 or n * LANES <= most))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes and blocks of a call.

    Attributes:
        batch, length, groups, d_state: B, L, G, N (a multiple of 8).
        channels: of a group, E / G.
        A, B, C: planes of each (2: complex).
        B_by_token, C_by_token: columns of every token, else constant [N, E].
        packed: some tokens reset the state.
    """

    batch: int
    length: int
    groups: int
    channels: int
    d_state: int
    sizes: Sizes
    A: int
    B: int
    C: int
    B_by_token: bool
    C_by_token: bool
    packed: bool
    interpret: mosaic.Interpret

    @property
    def time_blocks(self) -> int:
        """Blocks along time, the last perhaps not full."""
        return pl.cdiv(self.length, self.sizes.tokens)

    @property
    def blocks_a_group(self) -> int:
        """Blocks of channels that share B and C."""
        return self.channels // self.sizes.channels

    @property
    def grid(self) -> tuple[int, int, int]:
        """Batch, channel blocks of all groups, time blocks."""
        return self.batch, self.groups * self.blocks_a_group, self.time_blocks

    def by_token(self) -> tuple[str, ...]:
        """Of A, B, C: those that differ from token to token."""
        return ("B",) * self.B_by_token + ("C",) * self.C_by_token

    def constant(self) -> tuple[str, ...]:
        """The others."""
        return tuple(name for name in "ABC" if name not in self.by_token())

    @property
    def vmem_bytes(self) -> int:
        """What the backward, the larger, has in fast memory: two buffers of each block, and scratch."""
        tokens, channels, lanes = (pl.cdiv(n, LANES) * LANES for n in self.sizes)
        columns = (self.B * self.B_by_token + self.C * self.C_by_token) * tokens
        blocks = 5 * tokens * channels + self.d_state * (2 * columns + 6 * self.A * channels)
        scratch = self.d_state * (self.A * ((tokens + 1) * lanes + channels) + columns * LANES)
        return 4 * (2 * blocks + scratch)

    def each_chunk(self, body: Callable[[jax.Array, slice | pl.Slice], None]) -> None:
        """``body(number, channels)`` of the parts of a block's channels that are worked on at once."""
        lanes = self.sizes.lanes

        def chunk(i, _):
            body(i, pl.ds(pl.multiple_of(i * lanes, LANES), lanes))
            return 0

        if lanes == self.sizes.channels:
            body(jnp.int32(0), pl.ds(0, lanes))
        else:
            jax.lax.fori_loop(0, self.sizes.channels // lanes, chunk, 0)

    def tiles(self, time: jax.Array) -> jax.Array | int:
        """How many tiles of eight tokens block ``time`` has."""
        tiles = self.sizes.tokens // SUBLANES
        if self.length % self.sizes.tokens == 0:
            return tiles
        return jnp.minimum(tiles, pl.cdiv(self.length, SUBLANES) - time * tiles)


@dataclasses.dataclass(frozen=True)
class Specs:
    """The blocks of each kind of array; ``time`` maps a step of the grid to its block of tokens."""

    plan: Plan
    time: Callable[[jax.Array], jax.Array]

    def tokens(self) -> pl.BlockSpec:
        """Of [B, L, E]."""
        sizes = self.plan.sizes
        return pl.BlockSpec((None, sizes.tokens, sizes.channels), lambda b, e, t: (b, self.time(t), e))

    def columns(self) -> pl.BlockSpec:
        """Of [B, G, N, L]."""
        shape = (None, None, self.plan.d_state, self.plan.sizes.tokens)
        return pl.BlockSpec(
            shape, lambda b, e, t: (b, quotient(e, self.plan.blocks_a_group), 0, self.time(t))
        )

    def columns_of_block(self) -> pl.BlockSpec:
        """Of [B, G W', N, L]: one for each channel block."""
        shape = (None, None, self.plan.d_state, self.plan.sizes.tokens)
        return pl.BlockSpec(shape, lambda b, e, t: (b, e, 0, self.time(t)))

    def constant(self) -> pl.BlockSpec:
        """Of [N, E]."""
        return pl.BlockSpec((self.plan.d_state, self.plan.sizes.channels), lambda b, e, t: (0, e))

    def state(self) -> pl.BlockSpec:
        """Of [B, N, E]."""
        shape = (None, self.plan.d_state, self.plan.sizes.channels)
        return pl.BlockSpec(shape, lambda b, e, t: (b, 0, e))

    def states(self) -> pl.BlockSpec:
        """Of [B, L / T, N, E]."""
        shape = (None, None, self.plan.d_state, self.plan.sizes.channels)
        return pl.BlockSpec(shape, lambda b, e, t: (b, self.time(t), 0, e))

    def keep(self) -> pl.BlockSpec:
        """Of [B, 8, L], eight times the same."""
        return pl.BlockSpec((None, SUBLANES, self.plan.sizes.tokens), lambda b, e, t: (b, 0, self.time(t)))


def tile_rows(tile: jax.Array) -> slice | pl.Slice:
    """The eight rows of a tile."""
    return pl.ds(pl.multiple_of(tile * SUBLANES, SUBLANES), SUBLANES)


def strip(tile: jax.Array) -> tuple[slice | pl.Slice, jax.Array]:
    """The 128 lanes in which a tile's tokens have their columns, and where among them."""
    tiles = LANES // SUBLANES
    return pl.ds(pl.multiple_of(quotient(tile, tiles) * LANES, LANES), LANES), remainder(
        tile, tiles
    ) * SUBLANES


def spread(pairs: list[tuple], tiles) -> None:
    """Write the columns [N, 1] of each [N, T] along lanes, token after token, into its [T N, 128]."""

    def tile(i, _):
        lanes, start = strip(i)
        moved = [pltpu.roll(ref[:, lanes], (LANES - start) % LANES, 1) for ref, _ in pairs]
        for t in range(SUBLANES):
            for columns, (_, spread_ref) in zip(moved, pairs):
                states = columns.shape[0]
                rows = pl.ds(pl.multiple_of((i * SUBLANES + t) * states, SUBLANES), states)
                spread_ref[rows, :] = jnp.broadcast_to(columns[:, t : t + 1], (states, LANES))
        return 0

    jax.lax.fori_loop(0, tiles, tile, 0)


def spread_column(ref, states: int, tile: jax.Array, t: int, width: int) -> jax.Array:
    """The column [N, W] of token ``t`` of a tile, of what :func:`spread` left."""
    rows = pl.ds(pl.multiple_of((tile * SUBLANES + t) * states, SUBLANES), states)
    return jnp.concatenate([ref[rows, :]] * pl.cdiv(width, LANES), axis=1)[:, :width]


def exponents(A: Planes) -> Planes:
    """``A`` as :func:`decay` takes it: the chip's exponential is of base two."""
    return A[0] * LOG2_E, *A[1:]


def decay(dt: jax.Array, exponents: Planes) -> Planes:
    """exp(dt A) [N, W] of dt [1, W]."""
    size = jnp.exp2(dt * exponents[0])
    if len(exponents) == 1:
        return (size,)
    angle = dt * exponents[1]
    return size * jnp.cos(angle), size * jnp.sin(angle)


def sum_lanes(x: jax.Array) -> jax.Array:
    """[N, W] summed over channels: [N, 1]."""
    if x.shape[1] % LANES == 0:
        x = sum((x[:, i : i + LANES] for i in range(LANES, x.shape[1], LANES)), x[:, :LANES])
    return jnp.sum(x, axis=1, keepdims=True)


SUMS = (SUBLANES * SUBLANES, LANES)  # eight partial sums of each of eight tokens


def keep_sums(x: jax.Array, sums_refs, token: int) -> None:
    """Keep [N, W] of a token of a tile as eight partial sums over N; a ref [64, 128] for 128 of W each."""
    parts = [x[n : n + SUBLANES] for n in range(0, x.shape[0], SUBLANES)]
    total = sum(parts[1:], parts[0])
    for i, ref in enumerate(sums_refs):
        part = total[:, i * LANES : (i + 1) * LANES]
        ref[token * SUBLANES : (token + 1) * SUBLANES, : part.shape[1]] = part


def summed(sums_refs, width: int) -> jax.Array:
    """Sums over N of a tile's tokens [8, W]: one partial sum of every token at a time, read with a stride."""

    def over_states(ref) -> jax.Array:
        rows = [ref[pl.ds(row, SUBLANES, stride=SUBLANES), :] for row in range(SUBLANES)]
        while len(rows) > 1:
            rows = [a + b for a, b in zip(rows[::2], rows[1::2])]
        return rows[0]

    return jnp.concatenate([over_states(ref) for ref in sums_refs], axis=1)[:, :width]

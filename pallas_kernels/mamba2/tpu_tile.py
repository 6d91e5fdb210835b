"""What the fused kernels of a Mamba-2 layer share: their static facts, and the convolution of a strip of x.

They are the SSD kernels (``ssd/tpu_chunk.py``: chunks of Q tokens, time in lanes) with the convolution of x
before and the gated norm after. A grid step takes all heads over which y is normalised, part by part: what
lives between the stages of a part is small, and the norm needs no second pass over main memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic import LANES, SUBLANES, MiB, sigmoid
from pallas_kernels.ssd.tpu_chunk import Plan, cumulative

VMEM_LIMIT_BYTES = 60 * MiB  # v5p has 64
STRIP = 64  # channels worked on at once


@dataclasses.dataclass(frozen=True)
class Setup:
    """Static facts of a call.

    Attributes:
        plan: of the SSD; its ``block`` is the heads of a grid step, the same forward and backward.
        part: heads worked on at once; divides ``plan.block``.
        width: taps K of the convolution.
        norm: whether y is normalised, over the channels of a grid step. eps: in its root.
    """

    plan: Plan
    part: int
    width: int
    norm: bool
    eps: float

    @property
    def parts(self) -> int:
        """Parts of a grid step."""
        return self.plan.block // self.part

    @property
    def part_rows(self) -> int:
        """Channels of a part."""
        return self.part * self.plan.headdim

    @property
    def strip(self) -> int:
        """Channels of a strip."""
        return STRIP if self.part_rows % STRIP == 0 else self.plan.headdim

    @property
    def strips(self) -> int:
        """Strips of a grid step."""
        return self.plan.rows // self.strip

    @property
    def sums(self) -> int:
        """Rows of sums over time, a multiple of 8: one for each column of :meth:`specs`."""
        return -(-(self.width + 2) // SUBLANES) * SUBLANES

    def fast_memory(self, itemsize: int) -> int:
        """Bytes that a grid step of the backward holds: its blocks, their second buffers, scratch for all its
        heads; and 3 MiB for one part, the compiler's temporaries included."""
        tokens, states = (-(-n // LANES) * LANES for n in (self.plan.chunk, self.plan.d_state))
        blocks = tokens * (2 * 7 * itemsize + 3 * itemsize + 8) + states * (2 * itemsize + 20)
        return self.plan.rows * (blocks + 4 * LANES * (self.width + 2)) + 3 * MiB

    def split_parts(self, t: jax.Array) -> jax.Array:
        """[.., H, *] -> [.., H/part, part, *] of the axis before the last."""
        return t.reshape(*t.shape[:-2], -1, self.part, t.shape[-1])

    def specs(self, reverse: bool = False) -> dict[str, pl.BlockSpec]:
        """Those of the SSD, and: "parts" [B, H/part, part, L]; "skip" [H/part, part, 1], "skip_batch" with B;
        "columns" [H*P, K+2], taps, bias and the norm's weight of each channel; "past" [B, H*P, Q]; "row"
        [B, 1, L]; "block_row" [B, H/block, 1, L]; "sums" [B, H*P/strip, sums, strip]."""
        plan, rows, Q = self.plan, self.plan.rows, self.plan.chunk

        def at(c):
            return plan.chunks - 1 - c if reverse else c

        heads = (self.parts, self.part)
        return plan.specs(reverse) | {
            "parts": pl.BlockSpec((None, *heads, Q), lambda b, h, c: (b, h, 0, at(c))),
            "skip": pl.BlockSpec((*heads, 1), lambda b, h, c: (h, 0, 0)),
            "skip_batch": pl.BlockSpec((None, *heads, 1), lambda b, h, c: (b, h, 0, 0)),
            "columns": pl.BlockSpec((rows, self.width + 2), lambda b, h, c: (h, 0)),
            "past": pl.BlockSpec((None, rows, Q), lambda b, h, c: (b, h, 0)),
            "row": pl.BlockSpec((None, 1, Q), lambda b, h, c: (b, 0, at(c))),
            "block_row": pl.BlockSpec((None, None, 1, Q), lambda b, h, c: (b, h, 0, at(c))),
            "sums": pl.BlockSpec((None, self.strips, self.sums, self.strip), lambda b, h, c: (b, h, 0, 0)),
        }

    def for_parts(self, visit: Callable) -> None:
        """``visit(part, rows)`` for each part of a grid step, ``rows`` being its channels."""
        size = self.part_rows

        def step(i, _):
            visit(i, pl.ds(pl.multiple_of(i * size, size), size))
            return 0

        jax.lax.fori_loop(0, self.parts, step, 0)

    def for_strips(self, part, rows, visit: Callable) -> None:
        """``visit(rows, within, number)`` for the strips of a part: its rows of the grid step, those of the
        part, and its number. Written out, so that the compiler interleaves them."""
        count = self.part_rows // self.strip
        for i in range(count):
            start = pl.multiple_of(rows.start + i * self.strip, self.strip)
            visit(pl.ds(start, self.strip), pl.ds(i * self.strip, self.strip), part * count + i)

    def for_all_strips(self, visit: Callable) -> None:
        """``visit(rows, number)`` for every strip of a grid step: for what is done once a row."""

        def step(i, _):
            visit(pl.ds(pl.multiple_of(i * self.strip, self.strip), self.strip), i)
            return 0

        jax.lax.fori_loop(0, self.strips, step, 0)


def widen(setup: Setup, columns_ref, wide_ref) -> None:
    """Every column as a block of a tile of lanes, once a row: broadcasting along lanes is dear."""

    def strip(rows, _):
        for k in range(wide_ref.shape[0]):
            shape = (setup.strip, wide_ref.shape[2])
            wide_ref[k, rows, :] = jnp.broadcast_to(columns_ref[rows, k : k + 1], shape)

    setup.for_all_strips(strip)


def columns_of(wide_ref, rows, chunk: int) -> list[jax.Array]:
    """The columns of a strip, as blocks [strip, Q]."""
    copies = max(chunk // LANES, 1)
    tiles = [wide_ref[k, rows, :] for k in range(wide_ref.shape[0])]
    return [jnp.concatenate([t] * copies, axis=1) if copies > 1 else t[:, :chunk] for t in tiles]


def taps(before: jax.Array, now: jax.Array, reach: jax.Array | None, width: int) -> list[jax.Array]:
    """The inputs of a strip under each tap, the current token's first, float32.

    ``before``, ``now`` [strip, Q]: of the chunk before and of this one. ``reach`` [1, Q]: how many of the
    last K inputs, its own among them, a token sees (None: all).
    """
    before, now = before.astype(jnp.float32), now.astype(jnp.float32)
    chunk, lane = now.shape[1], jax.lax.broadcasted_iota(jnp.int32, now.shape, 1)
    # Chosen first and rotated then: half the rotations of shifting both.
    sources = [jnp.where(lane >= chunk - back, before, now) for back in range(1, width)]
    taps = [now, *(pltpu.roll(source, back, 1) for back, source in enumerate(sources, 1))]
    return taps if reach is None else [jnp.where(reach > back, tap, 0) for back, tap in enumerate(taps)]


def later(now: jax.Array, after: jax.Array, width: int) -> list[jax.Array]:
    """``now`` [.., Q] (32 bits), of which ``after`` is the chunk behind, 1, 2, ... K-1 tokens later."""
    chunk, lane = now.shape[1], jax.lax.broadcasted_iota(jnp.int32, now.shape, 1)
    sources = [jnp.where(lane < back, after, now) for back in range(1, width)]
    return [pltpu.roll(source, chunk - back, 1) for back, source in enumerate(sources, 1)]


def before_activation(taps: list[jax.Array], columns: list[jax.Array]) -> jax.Array:
    """The convolution, bias included, of a strip; ``columns`` as :func:`columns_of` gives them."""
    width = len(taps)
    return sum((tap * columns[width - 1 - back] for back, tap in enumerate(taps)), columns[width])


def visible(t: jax.Array, reach: jax.Array | None) -> jax.Array:
    """``t`` with zeros at padding."""
    return t if reach is None else jnp.where(reach > 0, t, 0)


def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x), as one hyperbolic tangent (see ``mosaic.sigmoid``)."""
    half = 0.5 * x
    return half + half * jnp.tanh(half)


def silu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """silu(x) and its derivative."""
    gate = sigmoid(x)
    silu = x * gate
    return silu, gate + silu * (1 - gate)


def fold(t: jax.Array) -> jax.Array:
    """The sum over channels but for 8 sublanes."""
    return jnp.sum(t.reshape(-1, SUBLANES, t.shape[1]), axis=0)


def keep_alpha(setup: Setup, alpha_ref, log_decay_ref) -> None:
    """The cumulative log decays of a chunk, by part: one product for all heads."""
    alpha = cumulative(log_decay_ref[...])
    for i in range(setup.parts):
        alpha_ref[i] = alpha[i * setup.part : (i + 1) * setup.part]

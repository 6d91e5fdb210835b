"""What the fused kernels of a Mamba-2 layer share: their static facts, and the convolution of a chunk of x.

They are the SSD kernels (``ssd/tpu_chunk.py``: a chunk of Q tokens of a block of heads a grid step, time in
lanes) with the convolution of x before and the gate after. Elementwise work goes strip by strip of channels.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.causal_conv1d import tpu_tile as conv
from pallas_kernels.mosaic import LANES, MiB, dot, quotient, remainder, sigmoid
from pallas_kernels.ssd.tpu_chunk import Plan

VMEM_LIMIT_BYTES = 60 * MiB  # v5p has 64
STRIP = 128  # channels worked on at once


@dataclasses.dataclass(frozen=True)
class Setup:
    """Static: the plan of the SSD, the taps K of the convolution, and whether (and how) y is normalised."""

    plan: Plan
    width: int
    norm: bool
    eps: float

    def backward(self) -> Setup:
        return dataclasses.replace(self, plan=self.plan.backward())

    def specs(self, reverse: bool = False) -> dict[str, pl.BlockSpec]:
        """Those of the SSD, and: "first", an integer a row; "columns" [H*P, K+2], taps, bias and the norm's
        weight of each channel; "past" [B, H*P, K-1]; "row" [B, 1, L]; "block_row" and "group_row", a row for
        each head block and each group, [B, .., 1, L]."""
        plan, rows = self.plan, self.plan.rows

        def at(c):
            return plan.chunks - 1 - c if reverse else c

        row = (None, None, 1, plan.chunk)
        return plan.specs(reverse) | {
            "first": pl.BlockSpec(memory_space=pltpu.SMEM),
            "columns": pl.BlockSpec((rows, self.width + 2), lambda b, h, c: (h, 0)),
            "columns_batch": pl.BlockSpec((None, rows, self.width + 2), lambda b, h, c: (b, h, 0)),
            "past": pl.BlockSpec((None, rows, self.width - 1), lambda b, h, c: (b, h, 0)),
            "row": pl.BlockSpec((None, 1, plan.chunk), lambda b, h, c: (b, 0, at(c))),
            "block_row": pl.BlockSpec(row, lambda b, h, c: (b, h, 0, at(c))),
            "group_row": pl.BlockSpec(row, lambda b, h, c: (b, quotient(h, plan.group_blocks), 0, at(c))),
        }


def near_past(first, start, setup: Setup):
    """Whether the past, K-1 inputs before token ``first``, is in the chunk or the 128 tokens before it."""
    return (first > start - LANES) & (first < start + setup.plan.chunk + setup.width)


def place_past(past_ref, before_ref, now_ref, first, start) -> None:
    """Write the past over the inputs of a chunk and of the 128 tokens before it."""

    def strip(rows):
        window = jnp.concatenate([before_ref[rows, :], now_ref[rows, :]], axis=1).astype(jnp.float32)
        past = past_ref[rows, :].astype(jnp.float32)
        window = conv.place(window, past, conv.times(window.shape, start) - first).astype(now_ref.dtype)
        before_ref[rows, :], now_ref[rows, :] = window[:, :LANES], window[:, LANES:]

    conv.for_strips(now_ref, strip, STRIP)


def shifts(chunk: int, width: int, dtype, *, ahead: bool) -> jax.Array:
    """0-1 matrix [Q + 128, (K-1) Q]: a window times it is the chunk 1, 2, ... tokens earlier or later.

    The window is a chunk behind the tile before it, or (``ahead``) before the tile after it. Copying through
    the matrix unit is exact, and much cheaper than shifting lanes: a chunk is a tile or two wide.
    """
    shape = (chunk + LANES, (width - 1) * chunk)
    source, target = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    by = quotient(target, chunk) + 1
    start = by if ahead else LANES - by
    return (source == remainder(target, chunk) + start).astype(dtype)


def taps(before_ref, now_ref, rows, reach, shift: jax.Array) -> list[jax.Array]:
    """The chunk's inputs under each tap, the current token's first, float32."""
    now = now_ref[rows, :]
    earlier = _split(dot(jnp.concatenate([before_ref[rows, :], now], axis=1), shift, (1, 0)), now.shape[1])
    taps = [now.astype(jnp.float32), *earlier]
    return taps if reach is None else [jnp.where(reach > back, tap, 0) for back, tap in enumerate(taps)]


def widen(columns_ref, wide_ref) -> None:
    """Every column as a block [H*P, Q], once a row: broadcasting along lanes is dear."""

    def strip(rows):
        for k in range(wide_ref.shape[0]):
            shape = (columns_ref[rows, :].shape[0], wide_ref.shape[2])
            wide_ref[k, rows, :] = jnp.broadcast_to(columns_ref[rows, k : k + 1], shape)

    conv.for_strips(columns_ref, strip, STRIP)


def before_activation(taps: list[jax.Array], columns: list[jax.Array]) -> jax.Array:
    """The convolution, bias included, of a strip; ``columns`` as :func:`widen` makes them."""
    width = len(taps)
    return sum((tap * columns[width - 1 - back] for back, tap in enumerate(taps)), columns[width])


def d_inputs(d, after, reaches, columns, shift: jax.Array) -> jax.Array:
    """Cotangents of a chunk's inputs from those of its convolution, ``d``, and of the 128 tokens ``after``.

    ``reaches``: of the tokens 0, 1, ... later, or None. ``columns`` as for :func:`before_activation`.
    """
    both = jnp.concatenate([d, after], axis=1).astype(shift.dtype)
    width = shift.shape[1] // d.shape[1] + 1
    dx = d * columns[width - 1]
    for back, later in enumerate(_split(dot(both, shift, (1, 0)), d.shape[1]), 1):
        seen = later if reaches is None else jnp.where(reaches[back] > back, later, 0)
        dx += seen * columns[width - 1 - back]
    return dx


def strip_of(wide_ref, rows) -> list[jax.Array]:
    """The wide columns of a strip."""
    return [wide_ref[k, rows, :] for k in range(wide_ref.shape[0])]


def _split(t: jax.Array, size: int) -> list[jax.Array]:
    return [t[:, i : i + size] for i in range(0, t.shape[1], size)]


def visible(t: jax.Array, reach: jax.Array | None) -> jax.Array:
    """``t`` with zeros at padding."""
    return t if reach is None else jnp.where(reach > 0, t, 0)


def silu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """silu(x) and its derivative."""
    gate = sigmoid(x)
    return x * gate, gate * (1 + x * (1 - gate))


def last_tile(t: jax.Array) -> jax.Array:
    """The last 128 tokens of ``t``, behind zeros where there are fewer."""
    missing = LANES - t.shape[1]
    if missing <= 0:
        return t[:, -LANES:]
    return jnp.concatenate([jnp.zeros((t.shape[0], missing), t.dtype), t], axis=1)

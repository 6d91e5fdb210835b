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
from pallas_kernels.mosaic import LANES, MiB, sigmoid
from pallas_kernels.ssd.tpu_chunk import Plan

VMEM_LIMIT_BYTES = 60 * MiB  # v5p has 64


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
            "group_row": pl.BlockSpec(row, lambda b, h, c: (b, h // plan.group_blocks, 0, at(c))),
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

    conv.for_strips(now_ref, strip)


def taps(before_ref, now_ref, rows, reach, width: int):
    """The chunk's inputs under each tap, float32."""
    window = jnp.concatenate([before_ref[rows, :], now_ref[rows, :]], axis=1)
    return conv.taps(window.astype(jnp.float32), reach, width)


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

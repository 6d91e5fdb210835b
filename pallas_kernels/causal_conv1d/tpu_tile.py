"""A block of the causal convolution in fast memory: what its two kernels share.

Blocks are [channels, time], float32, worked on a strip of channels at a time. *Reach* is how many of the last
K inputs, its own among them, a token sees (None: all K). ``columns`` [channels, K+1] are taps and bias.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic import LANES

STRIP = 16  # channels worked on at once: their values stay in registers


def strip_of(channels: int) -> int:
    """Channels of a strip: ``STRIP``, or all where it does not divide them."""
    return STRIP if channels % STRIP == 0 else channels


def for_strip(row, ref):
    """[1, Q] for every channel of a strip: a mask is cheap to compare, and dear to broadcast."""
    return jnp.broadcast_to(row, (strip_of(ref.shape[0]), row.shape[1]))


def for_strips(ref, visit) -> None:
    """``visit(rows)`` for strips of channels small enough that a strip's values stay in registers."""
    channels = ref.shape[0]
    strip = strip_of(channels)

    def step(i, _):
        visit(pl.ds(pl.multiple_of(i * strip, strip), strip))
        return 0

    jax.lax.fori_loop(0, channels // strip, step, 0)


def times(shape, start):
    """Time of each lane of a window that has the 128 tokens before ``start`` in front."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) + (start - LANES)


def place(window, past, after_first):
    """``window`` with ``past`` [C, K - 1] in the lanes before its first token."""
    taps_before = past.shape[1]
    for i in range(taps_before):
        window = jnp.where(after_first == i - taps_before, past[:, i : i + 1], window)
    return window


def taps(window, reach, width: int):
    """Inputs under each tap, the current token's first, zero where out of reach."""
    length = window.shape[1] - LANES
    taps = [window[:, LANES - back : LANES - back + length] for back in range(width)]
    return taps if reach is None else [jnp.where(reach > back, tap, 0) for back, tap in enumerate(taps)]


def before_activation(taps, columns):
    """Bias and weighted taps [C, L]; ``columns`` [C, K + 1] are the weights, and the bias last."""
    width = len(taps)
    y = columns[:, width : width + 1] + taps[0] * columns[:, width - 1 : width]
    for back in range(1, width):
        y += taps[back] * columns[:, width - 1 - back : width - back]
    return y


def fold(t):
    """A sum over time, but for the last 128 lanes where there are whole tiles: they are summed once a row."""
    if t.shape[1] % LANES:
        return jnp.sum(t, axis=1, keepdims=True)
    return sum(t[:, i : i + LANES] for i in range(0, t.shape[1], LANES))


def d_inputs(d, reach, columns, width: int):
    """Cotangents of the inputs; ``d`` and ``reach`` have 128 tokens more behind."""
    length, dx = d.shape[1] - LANES, 0.0
    for back in range(width):
        seen = d if reach is None else jnp.where(reach > back, d, 0)
        dx += seen[:, back : back + length] * columns[:, width - 1 - back : width - back]
    return dx


def d_past(d, reach, columns, width: int, first, start):
    """What this block gives the cotangent of the past: the columns of dx in whose place it stands, of the
    tile before the block too where no other block has it."""
    d = jnp.concatenate([jnp.zeros((d.shape[0], LANES), d.dtype), d], axis=1)
    if reach is not None:
        reach = jnp.concatenate([jnp.zeros((reach.shape[0], LANES), reach.dtype), reach], axis=1)
    dx = d_inputs(d, reach, columns, width)
    at = times(dx.shape, start)
    dx = jnp.where((at >= start) | (start == 0), dx, 0)
    picked = [jnp.where(at - first == i + 1 - width, dx, 0) for i in range(width - 1)]
    return jnp.concatenate([jnp.sum(t, axis=1, keepdims=True) for t in picked], axis=1)

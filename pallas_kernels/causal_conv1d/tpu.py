"""Depthwise causal convolution on TPU, forward and backward: one pass over x each, with time in lanes.

A block is [channels, time]: a tap is a shift along lanes, a channel's weight a column. The K-1 inputs before
a block are part of one 128-lane tile before it: the forward walks time and keeps that tile, the backward
walks time the other way, reads it again, and keeps the tile of cotangents behind its block. Which taps a
token sees is one integer a token, its *reach*: how many of the last K inputs are of its run, its own among
them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic, tuning
from pallas_kernels.causal_conv1d import tpu_tile as tile
from pallas_kernels.causal_conv1d import xla
from pallas_kernels.dispatch import unsuitable
from pallas_kernels.mosaic import LANES, sigmoid


class Setup(NamedTuple):
    """What is static in a call: K, the activation, and how the kernels run."""

    width: int
    activation: str | None
    interpret: mosaic.Interpret


def block_sizes(channels: int, length: int, dtype: DTypeLike) -> tuple[int, int]:
    """Channels and tokens of a block: whole tiles, or all there are."""
    default = {"channels": 256, "tokens": 1024}
    sizes = tuning.blocks("causal_conv1d", {"C": channels, "L": length}, dtype, default)
    tokens = max(sizes["tokens"] // LANES, 1) * LANES
    return (min(sizes["channels"], channels) // tile.STRIP * tile.STRIP or channels), min(tokens, length)


def unsupported(x, weight, bias, initial_state, segment_ids, activation) -> str | None:
    """Why the kernels cannot take a call; see ``dispatch.Kernel``."""
    arrays = {"x": x, "weight": weight, "bias": bias, "initial_state": initial_state}
    if reason := unsuitable(arrays, jnp.float32, jnp.bfloat16):
        return reason
    if weight.shape[0] > LANES:
        return f"K = {weight.shape[0]} taps are more than {LANES}; use long_conv"
    return None


def causal_conv1d(
    x: Float[Array, "B L C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, " C"],
    initial_state: Float[Array, "B K-1 C"],
    segment_ids: Int[Array, "B L"] | None,
    activation: str | None,
    *,
    interpret: mosaic.Interpret = False,
) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """Same contract as ``xla.causal_conv1d``.

    The transposes around the kernels are layouts to XLA: it has the neighbouring products write and read
    time-minor arrays.
    """
    (batch, length, _), width = x.shape, weight.shape[0]
    if length == 1 or width == 1:  # a product per channel, and no time to put in lanes
        return xla.causal_conv1d(x, weight, bias, initial_state, segment_ids, activation)
    reach, first = None, jnp.zeros(batch, jnp.int32)
    if segment_ids is not None:
        reach, first = xla.reach(segment_ids, width)[:, None], jnp.argmax(segment_ids != 0, axis=1)
    columns = jnp.concatenate([weight, bias[None].astype(weight.dtype)]).astype(jnp.float32).T
    past = initial_state.astype(x.dtype).swapaxes(1, 2)
    setup = Setup(width, activation, interpret)
    y = _convolve(x.swapaxes(1, 2), columns, past, reach, first.astype(jnp.int32), setup)
    return y.swapaxes(1, 2), xla.last_inputs(x, initial_state, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolve(x, columns, past, reach, first, setup: Setup):
    """y [B, C, L] of x; ``columns`` [C, K+1] are the taps and the bias, ``past`` [B, C, K-1] stands before
    token ``first`` [B]; ``reach`` [B, 1, L] or None where every token reaches K."""
    blocks = _Blocks(x, setup.width, reversed_time=False)
    inputs = [first, x, columns, past] + ([] if reach is None else [reach])
    specs = [blocks.scalars, blocks.tokens, blocks.columns, blocks.past, blocks.row]
    (y,) = mosaic.tpu_call(
        functools.partial(_forward_kernel, setup=setup, packed=reach is not None),
        name="causal_conv1d_forward",
        grid=blocks.grid,
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=specs[: len(inputs)],
        out_specs=[blocks.tokens],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        scratch_shapes=[pltpu.VMEM((blocks.channels, LANES), x.dtype)],
        interpret=setup.interpret,
    )(*inputs)
    return y


def _forward(x, columns, past, reach, first, setup):
    return _convolve(x, columns, past, reach, first, setup), (x, columns, past, reach, first)


def _backward(setup: Setup, residuals, dy):
    x, columns, past, reach, first = residuals
    blocks = _Blocks(x, setup.width, reversed_time=True)
    packed, several = reach is not None, blocks.grid[2] > 1
    inputs = [first, x, columns, past, dy] + [x] * several + [reach] * packed
    specs = [blocks.scalars, blocks.tokens, blocks.columns, blocks.past, blocks.tokens]
    specs += [blocks.before] * several + [blocks.row] * packed
    f32 = jnp.float32
    dx, d_columns, d_past = mosaic.tpu_call(
        functools.partial(_backward_kernel, setup=setup, packed=packed, several=several, length=x.shape[2]),
        name="causal_conv1d_backward",
        grid=blocks.grid,
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=specs,
        out_specs=[blocks.tokens, blocks.partial_columns, blocks.past],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((x.shape[0], *columns.shape), f32),
            jax.ShapeDtypeStruct(past.shape, f32),
        ],
        scratch_shapes=[
            pltpu.VMEM((blocks.channels, LANES), f32),
            pltpu.VMEM((tile.strip_of(blocks.channels), LANES), jnp.int32),
            pltpu.VMEM((setup.width + 1, blocks.channels, blocks.folded), f32),
        ],
        interpret=setup.interpret,
    )(*inputs)
    return dx, jnp.sum(d_columns, axis=0), d_past.astype(past.dtype), None, None


_convolve.defvjp(_forward, _backward)


class _Blocks:
    """Grid (row, channels, time), time innermost, and the blocks of every array."""

    def __init__(self, x: jax.Array, width: int, reversed_time: bool):
        batch, channels, length = x.shape
        self.channels, tokens = block_sizes(channels, length, x.dtype)
        steps = pl.cdiv(length, tokens)
        self.grid = (batch, pl.cdiv(channels, self.channels), steps)
        self.folded = LANES if tokens % LANES == 0 else 1

        def at(t):
            return steps - 1 - t if reversed_time else t

        def before(b, c, t):  # the tile before the block; any tile where there is none
            return b, c, jnp.maximum(at(t) * (tokens // LANES) - 1, 0)

        per_row = (None, self.channels)
        self.scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
        self.tokens = pl.BlockSpec((*per_row, tokens), lambda b, c, t: (b, c, at(t)))
        self.before = pl.BlockSpec((*per_row, LANES), before)
        self.row = pl.BlockSpec((None, 1, tokens), lambda b, c, t: (b, 0, at(t)))
        self.columns = pl.BlockSpec((self.channels, width + 1), lambda b, c, t: (c, 0))
        self.partial_columns = pl.BlockSpec((*per_row, width + 1), lambda b, c, t: (b, c, 0))
        self.past = pl.BlockSpec((*per_row, width - 1), lambda b, c, t: (b, c, 0))


def _window(before, x, past, first, start):
    """Inputs of tokens start - 128 .. start + Q, float32; ``past`` (or None) goes before token ``first``.

    What else stands before the row's first token is never read: it is out of everybody's reach.
    """
    window = jnp.concatenate([before, x], axis=1).astype(jnp.float32)
    if past is None:
        return window
    return tile.place(window, past.astype(jnp.float32), tile.times(window.shape, start) - first)


def _either_way(condition, run) -> None:
    """``run(True)`` or ``run(False)``: two programs, of which the common one does less."""
    pl.when(condition)(lambda: run(True))
    pl.when(jnp.logical_not(condition))(lambda: run(False))


def _forward_kernel(first_ref, x_ref, columns_ref, past_ref, *refs, setup: Setup, packed: bool):
    (*reach_ref, y_ref, before_ref) = refs
    tokens = x_ref.shape[1]
    start, first = pl.program_id(2) * tokens, first_ref[pl.program_id(0)]
    reach = tile.for_strip(reach_ref[0][...], x_ref) if packed else None

    def run(with_past: bool):
        def strip(rows):
            past = past_ref[rows, :] if with_past else None
            window = _window(before_ref[rows, :], x_ref[rows, :], past, first, start)
            y = tile.before_activation(tile.taps(window, reach, setup.width), columns_ref[rows, :])
            y = y * sigmoid(y) if setup.activation == "silu" else y
            y = y if reach is None else jnp.where(reach > 0, y, 0)
            y_ref[rows, :] = y.astype(y_ref.dtype)
            if tokens % LANES == 0:
                before_ref[rows, :] = x_ref[rows, tokens - LANES :]

        tile.for_strips(x_ref, strip)

    _either_way((first > start - LANES) & (first < start + tokens + setup.width), run)


def _backward_kernel(
    first_ref, x_ref, columns_ref, past_ref, dy_ref, *refs, setup: Setup, packed: bool, several: bool, length
):
    (*optional, dx_ref, d_columns_ref, d_past_ref, after_ref, reach_after_ref, sums_ref) = refs
    tokens, width, step, steps = x_ref.shape[1], setup.width, pl.program_id(2), pl.num_programs(2)
    start, first = (steps - 1 - step) * tokens, first_ref[pl.program_id(0)]
    reach, reach_both = None, None

    @pl.when(step == 0)
    def _():
        for ref in (after_ref, reach_after_ref, sums_ref, d_past_ref):
            ref[...] = jnp.zeros_like(ref)

    if packed:
        reach = tile.for_strip(optional[-1][...], x_ref)
        reach_both = jnp.concatenate([reach, reach_after_ref[...]], axis=1)

    def run(with_past: bool):
        def strip(rows):
            columns, x = columns_ref[rows, :], x_ref[rows, :]
            before = optional[0][rows, :] if several else jnp.zeros((x.shape[0], LANES), x.dtype)
            past = past_ref[rows, :] if with_past else None
            taps = tile.taps(_window(before, x, past, first, start), reach, width)
            d = dy_ref[rows, :].astype(jnp.float32)
            if setup.activation == "silu":
                y = tile.before_activation(taps, columns)
                gate = sigmoid(y)
                d = d * gate * (1 + y * (1 - gate))
            d = d if reach is None else jnp.where(reach > 0, d, 0)
            if length % tokens:  # behind the end of the row there is garbage, in x too
                inside = jax.lax.broadcasted_iota(jnp.int32, d.shape, 1) < length - start
                d, taps = jnp.where(inside, d, 0), [jnp.where(inside, tap, 0) for tap in taps]
            for back, tap in enumerate(taps):
                sums_ref[width - 1 - back, rows, :] += tile.fold(d * tap)
            sums_ref[width, rows, :] += tile.fold(d)
            d_both = jnp.concatenate([d, after_ref[rows, :]], axis=1)
            dx = tile.d_inputs(d_both, reach_both, columns, width)
            if with_past:
                d_past_ref[rows, :] += tile.d_past(d_both, reach_both, columns, width, first, start)
            dx = dx if reach is None else jnp.where(reach > 0, dx, 0)
            dx_ref[rows, :] = dx.astype(dx_ref.dtype)
            if several:
                after_ref[rows, :] = d[:, :LANES]

        tile.for_strips(x_ref, strip)

    _either_way((first > start - LANES) & (first < start + tokens + width), run)
    if reach is not None and several:
        reach_after_ref[...] = reach[:, :LANES]

    @pl.when(step == steps - 1)
    def _():
        for k in range(width + 1):
            d_columns_ref[:, k : k + 1] = jnp.sum(sums_ref[k], axis=1, keepdims=True)

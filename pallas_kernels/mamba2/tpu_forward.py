"""The forward of a Mamba-2 layer for TPU: x is convolved in fast memory, y gated before it leaves.

Raw x and z come in, and y silu(z) goes out with its sum of squares for each token and head block: the norm
is a scale for each token, which XLA multiplies in as it reads y for the product that follows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic
from pallas_kernels.causal_conv1d import tpu_tile as conv
from pallas_kernels.mamba2.tpu_tile import (
    STRIP,
    VMEM_LIMIT_BYTES,
    Setup,
    before_activation,
    last_tile,
    near_past,
    place_past,
    shifts,
    silu_and_slope,
    strip_of,
    taps,
    visible,
    widen,
)
from pallas_kernels.mosaic import LANES, dot
from pallas_kernels.ssd.tpu_chunk import by_head, decays, over_channels, through
from pallas_kernels.ssd.tpu_forward import write_output


def _kernel(
    first_ref,
    x_ref,
    z_ref,
    columns_ref,
    past_ref,
    scale_ref,
    log_decay_ref,
    B_ref,
    C_ref,
    D_ref,
    initial_ref,
    *others,
    setup: Setup,
    save: bool,
):
    refs = list(others)
    plan, step = setup.plan, pl.program_id(2)
    reach = conv.for_strip(refs.pop(0)[...], x_ref, STRIP) if plan.packed else None
    counts = refs.pop(0)[...] if plan.packed else None
    gated_ref, squares_ref, final_ref = (refs.pop(0) for _ in range(3))
    starts_ref = refs.pop(0) if save else None
    state_ref, before_ref, now_ref, mixed_ref, y_ref, sums_ref, wide_ref = refs
    start, first = step * plan.chunk, first_ref[pl.program_id(0)]

    @pl.when(step == 0)
    def _():
        state_ref[...] = initial_ref[...]
        before_ref[...] = jnp.zeros_like(before_ref)
        widen(columns_ref, wide_ref)

    now_ref[...] = x_ref[...]
    pl.when(near_past(first, start, setup))(lambda: place_past(past_ref, before_ref, now_ref, first, start))

    shift = shifts(plan.chunk, setup.width, x_ref.dtype, ahead=False)

    def mix(rows):
        inputs = taps(before_ref, now_ref, rows, reach, shift)
        mixed, _ = silu_and_slope(before_activation(inputs, strip_of(wide_ref, rows)))
        mixed_ref[rows, :] = visible(mixed, reach).astype(mixed_ref.dtype)

    conv.for_strips(x_ref, mix, STRIP)
    before_ref[...] = last_tile(now_ref[...])

    R = state_ref[...]
    if starts_ref is not None:
        starts_ref[...] = R.astype(starts_ref.dtype)
    B, scale, decay = B_ref[...], scale_ref[...], decays(log_decay_ref[...], counts)
    x = by_head(mixed_ref[...], plan.block)
    write_output(y_ref, x, scale, B, C_ref[...], D_ref[...], R, decay)
    state_ref[...] = through(R, decay) + dot(over_channels(x, decay.to_end * scale, B.dtype), B, (1, 0))

    sums_ref[...] = jnp.zeros_like(sums_ref)

    def gate(rows):
        silu, _ = silu_and_slope(z_ref[rows, :].astype(jnp.float32))
        gated = visible(y_ref[rows, :] * silu, reach)
        gated_ref[rows, :] = gated.astype(gated_ref.dtype)
        sums_ref[...] += gated * gated

    conv.for_strips(x_ref, gate, STRIP)
    squares_ref[...] = jnp.sum(sums_ref[...], axis=0, keepdims=True)

    @pl.when(step == plan.chunks - 1)
    def _():
        final_ref[...] = state_ref[...]


def forward(
    setup: Setup, x, z, columns, past, scale, log_decay, B, C, D, state, reach, first, counts, *, save: bool
):
    """y silu(z) [B, H*P, L]; its sums of squares [B, H/K, 1, L]; the final state; chunk-start states or None.

    x, z [B, H*P, L]; columns, past, reach [B, 1, L] and first [B] as in ``Setup.specs``; the others as in
    ``ssd/tpu_forward.py``.
    """
    plan, specs, f32 = setup.plan, setup.specs(), jnp.float32
    inputs = [
        (first, "first"),
        (x, "channels"),
        (z, "channels"),
        (columns, "columns"),
        (past, "past"),
        (plan.split_heads(scale), "heads"),
        (plan.split_heads(log_decay), "heads"),
        (B, "group"),
        (C, "group"),
        (D.reshape(-1, plan.block, 1), "head"),
        (state, "state"),
    ]
    if plan.packed:
        inputs += [(reach, "row"), (counts, "counts")]
    squares = (plan.batch, plan.head_blocks, 1, x.shape[2])
    outputs = [(x.shape, x.dtype, "channels"), (squares, f32, "block_row"), (state.shape, f32, "state")]
    if save:
        outputs.append(((plan.batch, plan.chunks, *state.shape[1:]), B.dtype, "starts"))
    block = (plan.rows, plan.chunk)
    results = mosaic.tpu_call(
        functools.partial(_kernel, setup=setup, save=save),
        name="gated_ssd_forward",
        grid=(plan.batch, plan.head_blocks, plan.chunks),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[specs[kind] for _, kind in inputs],
        out_specs=[specs[kind] for _, _, kind in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
        scratch_shapes=[
            pltpu.VMEM((plan.rows, plan.d_state), f32),
            pltpu.VMEM((plan.rows, LANES), x.dtype),
            pltpu.VMEM(block, x.dtype),
            pltpu.VMEM(block, x.dtype),
            pltpu.VMEM(block, f32),
            pltpu.VMEM((conv.strip_of(plan.rows, STRIP), plan.chunk), f32),
            pltpu.VMEM((setup.width + 2, *block), f32),
        ],
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
        interpret=plan.interpret,
    )(*(array for array, _ in inputs))
    return (*results, None)[:4]

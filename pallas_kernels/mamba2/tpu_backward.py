"""The backward of a Mamba-2 layer for TPU: chunks from the last to the first, everything computed again.

What is read is raw x and z, the cotangent of the result and the chunk-start states. The convolution needs
the inputs before its chunk, so a grid step loads x of the chunk *before* the one it works on, whose own x it
kept: there is one step more than chunks. The cotangents behind the chunk are kept likewise.
"""

from __future__ import annotations

import functools
import types
from typing import Any

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
    d_inputs,
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
from pallas_kernels.mosaic import LANES
from pallas_kernels.ssd.tpu_backward import chunk_gradients, sum_channels, sum_parts
from pallas_kernels.ssd.tpu_chunk import by_head, decays
from pallas_kernels.ssd.tpu_forward import write_output

INPUTS: tuple[str, ...] = ("first", "x", "z", "d_out", "columns", "past", "scale", "log_decay", "B", "C", "D")
INPUTS += ("starts", "d_final", "overlap")
OUTPUTS = ("dx", "dz", "d_columns", "d_past", "d_scale", "d_log_decay", "dB", "dC", "dD", "d_initial")
SCRATCH = ("now", "before", "mixed", "raw", "y", "d", "after", "reach_after", "sums", "dR", "carried", "wide")


def _kernel(*refs, setup: Setup):
    named = dict.fromkeys(("inverse", "pull", "reach", "counts"))
    names = _input_names(setup) + OUTPUTS + SCRATCH
    ref: Any = types.SimpleNamespace(**named | dict(zip(names, refs, strict=True)))
    step, first = pl.program_id(2), ref.first[pl.program_id(0)]

    @pl.when(step == 0)
    def _():
        ref.dR[...], ref.carried[...] = ref.d_final[...], ref.overlap[...]
        for sums in (ref.dD, ref.sums, ref.after, ref.reach_after, ref.d_past):
            sums[...] = jnp.zeros_like(sums)
        widen(ref.columns, ref.wide)

    @pl.when(step > 0)
    def _():
        _chunk(ref, setup, setup.plan.chunks - step, first)

    ref.now[...] = ref.x[...]

    @pl.when(step == setup.plan.chunks)
    def _():
        ref.d_initial[...] = ref.dR[...]
        for k in range(setup.width + 2):
            ref.d_columns[:, k : k + 1] = jnp.sum(ref.sums[k], axis=1, keepdims=True)


def _chunk(ref: Any, setup: Setup, chunk, first) -> None:
    plan, start = setup.plan, chunk * setup.plan.chunk
    reach = None if ref.reach is None else conv.for_strip(ref.reach[...], ref.x, STRIP)
    near = near_past(first, start, setup)
    ref.before[...] = last_tile(ref.x[...])
    pl.when(near)(lambda: place_past(ref.past, ref.before, ref.now, first, start))

    earlier = shifts(plan.chunk, setup.width, ref.now.dtype, ahead=False)

    def mix(rows):
        inputs = taps(ref.before, ref.now, rows, reach, earlier)
        raw = before_activation(inputs, strip_of(ref.wide, rows))
        mixed, _ = silu_and_slope(raw)
        ref.raw[rows, :] = raw
        ref.mixed[rows, :] = visible(mixed, reach).astype(ref.mixed.dtype)

    conv.for_strips(ref.x, mix, STRIP)
    x, scale = by_head(ref.mixed[...], plan.block), ref.scale[...]
    B, C, D, R = ref.B[...], ref.C[...], ref.D[...], ref.starts[...]
    decay = decays(ref.log_decay[...], None if ref.counts is None else ref.counts[...])
    write_output(ref.y, x, scale, B, C, D, R, decay)
    conv.for_strips(ref.x, functools.partial(_gate, ref, setup, reach), STRIP)

    dy = by_head(ref.d[...], plan.block)
    d = chunk_gradients(x, scale, B, C, R, dy, ref.dR[...], decay)
    ref.d[...] = (d.u * scale[:, None, :] + dy * D[:, :, None]).reshape(-1, plan.chunk)
    ref.dD[...] += sum_channels(dy * x)
    ref.d_scale[...], ref.d_log_decay[...] = d.scale, d.log_decay + ref.carried[...]
    ref.dB[...], ref.dC[...] = d.B, d.C
    ref.dR[...], ref.carried[...] = d.R, d.overlap

    reach_both = None if reach is None else jnp.concatenate([reach, ref.reach_after[...]], axis=1)
    later = shifts(plan.chunk, setup.width, ref.now.dtype, ahead=True)
    reaches = None
    if reach_both is not None:
        reaches = [reach_both[:, back : back + plan.chunk] for back in range(setup.width)]

    def unmix(rows):
        d = _before_silu(ref, setup, reach, earlier, rows)
        dx = d_inputs(d, ref.after[rows, :], reaches, strip_of(ref.wide, rows), later)
        ref.dx[rows, :] = visible(dx, reach).astype(ref.dx.dtype)
        both = jnp.concatenate([d, ref.after[rows, :]], axis=1)
        ref.after[rows, :] = both[:, :LANES]

        @pl.when(near)
        def _():
            columns = ref.columns[rows, :]
            ref.d_past[rows, :] += conv.d_past(both, reach_both, columns, setup.width, first, start)

    conv.for_strips(ref.x, unmix, STRIP)
    if reach_both is not None:
        ref.reach_after[...] = reach_both[:, :LANES]


def _gate(ref: Any, setup: Setup, reach, rows) -> None:
    """Cotangents of y, into ``ref.d``, and of z, of a strip; the sum for the norm's weight."""
    y, d_out = ref.y[rows, :], ref.d_out[rows, :].astype(jnp.float32)
    silu, slope = silu_and_slope(ref.z[rows, :].astype(jnp.float32))
    d_gated = d_out
    if setup.norm:
        gated, inverse = y * silu, ref.inverse[...]
        weight = ref.wide[setup.width + 1, rows, :]
        ref.sums[setup.width + 1, rows, :] += conv.fold(visible(d_out * gated * inverse, reach))
        d_gated = d_out * weight * inverse - gated * ref.pull[...]
    d_gated = visible(d_gated, reach)
    ref.d[rows, :] = d_gated * silu
    ref.dz[rows, :] = (d_gated * y * slope).astype(ref.dz.dtype)


def _before_silu(ref: Any, setup: Setup, reach, shift, rows):
    """Cotangent of the convolution of x, of a strip; the sums for taps and bias."""
    _, slope = silu_and_slope(ref.raw[rows, :])
    d = visible(ref.d[rows, :] * slope, reach)
    for back, tap in enumerate(taps(ref.before, ref.now, rows, reach, shift)):
        ref.sums[setup.width - 1 - back, rows, :] += conv.fold(d * tap)
    ref.sums[setup.width, rows, :] += conv.fold(d)
    return d


def _input_names(setup: Setup) -> tuple[str, ...]:
    return INPUTS + ("inverse", "pull") * setup.norm + ("reach", "counts") * setup.plan.packed


def backward(setup: Setup, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Gradients by the names of ``OUTPUTS``: dx, dz, dB and dC in the dtype of x, the others float32.

    Args:
        arrays: by the names of ``INPUTS``, as in ``forward``; ``starts`` is what it saved, d_out [B, H*P, L]
            the cotangent of the normalised result, ``overlap`` [B, H] <d_final, final>. With a norm,
            ``inverse`` [B, G, 1, L] 1 / rms, and ``pull``, how much of the gated y its cotangent loses to it.
            With segments, ``reach`` and ``counts``.
    """
    setup = setup.backward()
    plan, f32 = setup.plan, jnp.float32
    x, blocks = arrays["x"], (plan.batch, plan.head_blocks)
    arrays = arrays | {
        "scale": plan.split_heads(arrays["scale"]),
        "log_decay": plan.split_heads(arrays["log_decay"]),
        "D": arrays["D"].reshape(-1, plan.block, 1),
        "overlap": arrays["overlap"].reshape(*blocks, plan.block, 1),
    }
    kinds = {"x": "x", "z": "channels", "d_out": "channels", "columns": "columns", "past": "past"}
    kinds |= {
        "first": "first",
        "scale": "heads",
        "log_decay": "heads",
        "B": "group",
        "C": "group",
        "D": "head",
    }
    kinds |= {"starts": "starts", "d_final": "state", "overlap": "head_batch", "inverse": "group_row"}
    kinds |= {"pull": "group_row", "reach": "row", "counts": "counts"}
    length = x.shape[2]
    by_head_shape, parts = (*blocks, plan.block, length), (*blocks, length, plan.d_state)
    outputs = {
        "dx": (x.shape, x.dtype, "channels"),
        "dz": (x.shape, x.dtype, "channels"),
        "d_columns": ((plan.batch, *arrays["columns"].shape), f32, "columns_batch"),
        "d_past": (arrays["past"].shape, f32, "past"),
        "d_scale": (by_head_shape, f32, "heads"),
        "d_log_decay": (by_head_shape, f32, "heads"),
        "dB": (parts, f32, "group_parts"),
        "dC": (parts, f32, "group_parts"),
        "dD": ((*blocks, plan.block, 1), f32, "head_batch"),
        "d_initial": (arrays["d_final"].shape, f32, "state"),
    }
    specs, names = _specs(setup), _input_names(setup)
    results = mosaic.tpu_call(
        functools.partial(_kernel, setup=setup),
        name="gated_ssd_backward",
        grid=(*blocks, plan.chunks + 1),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[specs[kinds[name]] for name in names],
        out_specs=[specs[kind] for _, _, kind in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
        scratch_shapes=_scratch(setup, x.dtype),
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
        interpret=plan.interpret,
    )(*(arrays[name] for name in names))
    d = dict(zip(outputs, results))
    rows = (plan.batch, plan.heads, length)
    return d | {
        "d_columns": d["d_columns"].sum(0),
        "d_scale": d["d_scale"].reshape(rows),
        "d_log_decay": d["d_log_decay"].reshape(rows),
        "dB": sum_parts(plan, d["dB"], arrays["B"]),
        "dC": sum_parts(plan, d["dC"], arrays["C"]),
        "dD": d["dD"].sum(0).reshape(-1),
    }


def _specs(setup: Setup) -> dict[str, pl.BlockSpec]:
    """Every array a step late, but x."""

    def late(spec: pl.BlockSpec) -> pl.BlockSpec:
        index = spec.index_map
        if index is None:
            return spec
        return pl.BlockSpec(spec.block_shape, lambda b, h, s: index(b, h, jnp.maximum(s - 1, 0)))

    plan = setup.plan
    ahead = pl.BlockSpec(
        (None, plan.rows, plan.chunk), lambda b, h, s: (b, h, jnp.maximum(plan.chunks - 1 - s, 0))
    )
    return {kind: late(spec) for kind, spec in setup.specs(reverse=True).items()} | {"x": ahead}


def _scratch(setup: Setup, dtype) -> list:
    plan, f32 = setup.plan, jnp.float32
    block, tile = (plan.rows, plan.chunk), (plan.rows, LANES)
    folded = LANES if plan.chunk % LANES == 0 else 1
    shapes = {
        "now": (block, dtype),
        "before": (tile, dtype),
        "mixed": (block, dtype),
        "raw": (block, f32),
        "y": (block, f32),
        "d": (block, f32),
        "after": (tile, f32),
        "reach_after": ((conv.strip_of(plan.rows, STRIP), LANES), jnp.int32),
        "sums": ((setup.width + 2, plan.rows, folded), f32),
        "dR": ((plan.rows, plan.d_state), f32),
        "carried": ((plan.block, 1), f32),
        "wide": ((setup.width + 2, *block), f32),
    }
    return [pltpu.VMEM(*shapes[name]) for name in SCRATCH]

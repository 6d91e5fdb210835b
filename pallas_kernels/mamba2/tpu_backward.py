"""The backward of a Mamba-2 layer for TPU: chunks from the last to the first, everything computed again.

What is read is raw x and z, the cotangent of the result and the chunk-start states. The convolution needs
the inputs before its chunk, so a grid step loads x of the chunk *before* the one it works on, whose own x it
kept: there is one step more than chunks. The cotangents behind the chunk are kept likewise. A chunk is gone
through twice: how much the norm takes from a token is known only when all its channels are.
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
from pallas_kernels.mamba2.tpu_tile import (
    VMEM_LIMIT_BYTES,
    Setup,
    before_activation,
    columns_of,
    fold,
    keep_alpha,
    later,
    silu,
    silu_and_slope,
    taps,
    visible,
    widen,
)
from pallas_kernels.mosaic import LANES, SUBLANES, dot
from pallas_kernels.ssd import tpu_chunk
from pallas_kernels.ssd.tpu_backward import chunk_gradients, sum_parts, with_scores
from pallas_kernels.ssd.tpu_chunk import by_head, cumulative, decays
from pallas_kernels.ssd.tpu_forward import write_output

# What comes in, by the kind of its block, and what goes out.
INPUTS = {"x": "ahead", "z": "channels", "d_out": "channels", "columns": "columns", "past": "past"}
INPUTS |= {"scale": "parts", "log_decay": "heads", "B": "group", "C": "group", "D": "skip"}
INPUTS |= {"starts": "starts", "d_final": "state", "overlap": "skip_batch"}
NORM = {"inverse": "block_row"}
PACKED = {"reach": "row", "counts": "counts"}
OUTPUTS = {"dx": "channels", "dz": "channels", "sums": "sums", "d_past": "past", "d_scale": "parts"}
OUTPUTS |= {"d_log_decay": "heads", "dB": "group_parts", "dC": "group_parts", "dD": "skip_batch"}
OUTPUTS |= {"d_initial": "state"}


def _kernel(*refs, setup: Setup, names: tuple[str, ...]):
    ref: Any = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    step, plan = pl.program_id(2), setup.plan

    @pl.when(step == 0)
    def _():
        ref.dR[...], ref.carried[...] = ref.d_final[...], ref.overlap[...]
        ref.now[...] = ref.x[...]
        for sums in (ref.dD, ref.sums, ref.after, ref.reach_after):
            sums[...] = jnp.zeros_like(sums)
        widen(setup, ref.columns, ref.wide)

    @pl.when(step > 0)
    def _():
        _chunk(ref, setup, plan.chunks - step)

    @pl.when(step == plan.chunks)
    def _():
        ref.d_initial[...] = ref.dR[...]
        reaches = _reaches(ref, setup, jnp.zeros_like(ref.reach)) if plan.packed else None
        nothing = jnp.zeros((setup.strip, plan.chunk), jnp.float32)

        def past(rows, number):
            d_past = _unconvolve(ref, setup, ref.past[rows, :], nothing, reaches, rows, number)
            ref.d_past[rows, :] = d_past.astype(ref.d_past.dtype)

        setup.for_all_strips(past)


def _chunk(ref: Any, setup: Setup, chunk) -> None:
    plan = setup.plan
    reach = ref.reach[...] if plan.packed else None
    counts = ref.counts[...] if plan.packed else None
    B, C, seen = ref.B[...], ref.C[...], tpu_chunk.visible(plan.chunk, counts)
    keep_alpha(setup, ref.alpha, ref.log_decay)
    ref.scores[...] = jnp.where(seen, dot(B, C, (1, 1)), 0.0)
    for sums in (ref.along, ref.d_scores, ref.dB, ref.dC):
        sums[...] = jnp.zeros_like(sums)

    def again(i, rows):
        setup.for_strips(i, rows, functools.partial(_mix, ref, setup, reach, chunk))
        x, R, decay = (
            by_head(ref.mixed[rows, :], setup.part),
            ref.starts[rows, :],
            decays(ref.alpha[i], counts),
        )
        write_output(ref.y.at[rows, :], x, ref.scale[i], ref.scores[...], C, ref.D[i], R, decay)
        if setup.norm:
            setup.for_strips(i, rows, functools.partial(_take_norm, ref, setup, reach))

    setup.for_parts(again)
    pull = None
    if setup.norm:
        along = jnp.sum(ref.along[...], axis=0, keepdims=True)
        pull = ref.inverse[...] ** 3 * along * (1 / plan.rows)
    reaches = None if reach is None else _reaches(ref, setup, reach)

    def back(i, rows):
        setup.for_strips(i, rows, functools.partial(_ungate, ref, setup, reach, pull))
        _unmix_states(ref, setup, counts, B, C, i, rows)
        setup.for_strips(i, rows, functools.partial(_unmix, ref, setup, reaches))

    setup.for_parts(back)
    ref.dB[...], ref.dC[...] = with_scores(
        ref.dB[...], ref.dC[...], jnp.where(seen, ref.d_scores[...], 0.0), B, C
    )
    d_alpha = jnp.concatenate([ref.d_alpha[i] for i in range(setup.parts)], axis=0)
    ref.d_log_decay[...] = cumulative(d_alpha, reverse=True)
    if reach is not None:
        ref.reach_after[...] = jnp.broadcast_to(reach, ref.reach_after.shape)


def _mix(ref: Any, setup: Setup, reach, chunk, rows, *_) -> None:
    """The convolution of a strip, its SiLU and the slope of that."""
    before = jnp.where(chunk == 0, ref.past[rows, :], ref.x[rows, :])
    inputs = taps(before, ref.now[rows, :], reach, setup.width)
    mixed, slope = silu_and_slope(before_activation(inputs, columns_of(ref.wide, rows, setup.plan.chunk)))
    ref.mixed[rows, :] = visible(mixed, reach).astype(ref.mixed.dtype)
    ref.slope[rows, :] = visible(slope, reach).astype(ref.slope.dtype)


def _take_norm(ref: Any, setup: Setup, reach, rows, *_) -> None:
    """How the cotangent of the normalised y lies along y."""
    gated = ref.y[rows, :] * silu(ref.z[rows, :].astype(jnp.float32))
    weight = columns_of(ref.wide, rows, setup.plan.chunk)[setup.width + 1]
    along = gated * (ref.d_out[rows, :].astype(jnp.float32) * weight)
    ref.along[...] += fold(visible(along, reach))


def _ungate(ref: Any, setup: Setup, reach, pull, rows, within, number) -> None:
    """Cotangents of y, into ``ref.d``, and of z, of a strip; the sum for the norm's weight."""
    y, d_out = ref.y[rows, :], visible(ref.d_out[rows, :].astype(jnp.float32), reach)
    gate, slope = silu_and_slope(ref.z[rows, :].astype(jnp.float32))
    d_gated = d_out
    if pull is not None:
        gated, scaled = y * gate, d_out * ref.inverse[...]
        weight = columns_of(ref.wide, rows, setup.plan.chunk)[setup.width + 1]
        ref.sums[number] += _over_time(setup, {setup.width + 1: scaled * gated}, ref.x.dtype)
        d_gated = scaled * weight - visible(gated * pull, reach)
    ref.d[within, :] = d_gated * gate
    ref.dz[rows, :] = (d_gated * y * slope).astype(ref.dz.dtype)


def _unmix_states(ref: Any, setup: Setup, counts, B, C, i, rows) -> None:
    """The SSD of a part backward: the cotangent of y in ``ref.d`` becomes that of the convolved x."""
    x, dy = by_head(ref.mixed[rows, :], setup.part), by_head(ref.d[...], setup.part)
    D, scale = ref.D[i], ref.scale[i]
    skipped = jnp.sum(dy * x, 1)
    read = jnp.sum(dy * by_head(ref.y[rows, :], setup.part), 1) - D * skipped
    R, decay = ref.starts[rows, :], decays(ref.alpha[i], counts)
    d = chunk_gradients(x, scale, ref.scores[...], B, C, R, dy, ref.dR[rows, :], decay, read)
    ref.d[...] = (d.u * scale[:, None, :] + dy * D[:, :, None]).reshape(-1, setup.plan.chunk)
    ref.dD[i] += jnp.sum(skipped, 1, keepdims=True)
    ref.d_scale[i] = d.scale
    last = jax.lax.broadcasted_iota(jnp.int32, d.alpha.shape, 1) == setup.plan.chunk - 1
    ref.d_alpha[i] = d.alpha + jnp.where(last, ref.carried[i], 0.0)
    ref.d_scores[...] += d.scores
    ref.dB[...] += d.B
    ref.dC[...] += d.C
    ref.dR[rows, :], ref.carried[i] = d.R, d.overlap


def _unmix(ref: Any, setup: Setup, reaches, rows, within, number) -> None:
    """The convolution of a strip backward."""
    d = ref.d[within, :] * ref.slope[rows, :].astype(jnp.float32)
    dx = _unconvolve(ref, setup, ref.now[rows, :], d, reaches, rows, number)
    ref.dx[rows, :] = dx.astype(ref.dx.dtype)
    ref.after[rows, :] = d
    ref.now[rows, :] = ref.x[rows, :]


def _unconvolve(ref: Any, setup: Setup, x, d, reaches, rows, number) -> jax.Array:
    """Cotangent of the inputs ``x`` of a strip whose convolution has ``d``; the sums for taps and bias."""
    width, columns = setup.width, columns_of(ref.wide, rows, setup.plan.chunk)
    seen = [d, *later(d, ref.after[rows, :], width)]
    if reaches is not None:
        seen[1:] = [jnp.where(reaches[back] > back, t, 0) for back, t in enumerate(seen[1:], 1)]
    x = x.astype(jnp.float32)
    products = {width - 1 - back: x * t for back, t in enumerate(seen)} | {width: seen[0]}
    ref.sums[number] += _over_time(setup, products, ref.x.dtype)
    return sum(t * columns[width - 1 - back] for back, t in enumerate(seen))


def _over_time(setup: Setup, products: dict[int, jax.Array], dtype) -> jax.Array:
    """Sums over time [sums, strip] of blocks [strip, Q], each in the row that is its key.

    A product with ones, which is cheaper than sums along lanes."""
    shape = (setup.sums, setup.plan.chunk)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    ones = jnp.concatenate([(row == k).astype(dtype) for k in products], axis=1)
    return dot(ones, jnp.concatenate([t.astype(dtype) for t in products.values()], axis=1), (1, 1))


def _reaches(ref: Any, setup: Setup, reach) -> list[jax.Array]:
    """The reach of the tokens 0, 1, ... K-1 later; ``reach`` and each of them [1, Q]."""
    reach = jnp.broadcast_to(reach, ref.reach_after.shape)
    return [t[:1] for t in (reach, *later(reach, ref.reach_after[...], setup.width))]


def backward(setup: Setup, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Gradients by the names of ``OUTPUTS``: dx, dz, d_past, dB and dC in the dtype of x, the others float32;
    instead of "sums" d_columns [H*P, K+2].

    Args:
        arrays: by the names of ``INPUTS``, with a norm ``NORM``, with segments ``PACKED``, as in ``forward``;
            ``starts`` and ``inverse`` are what it saved, d_out [B, H*P, L] the cotangent of its y,
            ``overlap`` [B, H] <d_final, final>.
    """
    plan, specs = setup.plan, _specs(setup)
    blocks, length = (plan.batch, plan.head_blocks), arrays["x"].shape[2]
    arrays = arrays | {
        "scale": setup.split_parts(arrays["scale"]),
        "log_decay": plan.split_heads(arrays["log_decay"]),
        "D": setup.split_parts(arrays["D"][:, None]),
        "overlap": setup.split_parts(arrays["overlap"][..., None]),
    }
    inputs = INPUTS | (NORM if setup.norm else {}) | (PACKED if plan.packed else {})
    shapes = _shapes(setup, arrays)
    scratch = _scratch(setup, arrays["x"].dtype)
    results = mosaic.tpu_call(
        functools.partial(_kernel, setup=setup, names=(*inputs, *OUTPUTS, *scratch)),
        name="gated_ssd_backward",
        grid=(*blocks, plan.chunks + 1),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[specs[kind] for kind in inputs.values()],
        out_specs=[specs[kind] for kind in OUTPUTS.values()],
        out_shape=[jax.ShapeDtypeStruct(*shapes[name]) for name in OUTPUTS],
        scratch_shapes=list(scratch.values()),
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
        interpret=plan.interpret,
    )(*(arrays[name] for name in inputs))
    d = dict(zip(OUTPUTS, results))
    rows = (plan.batch, plan.heads, length)
    columns = d.pop("sums").sum(0)[:, : setup.width + 2].swapaxes(1, 2)
    return d | {
        "d_columns": columns.reshape(-1, setup.width + 2),
        "d_scale": d["d_scale"].reshape(rows),
        "d_log_decay": d["d_log_decay"].reshape(rows),
        "dB": sum_parts(plan, d["dB"], arrays["B"]),
        "dC": sum_parts(plan, d["dC"], arrays["C"]),
        "dD": d["dD"].sum(0).reshape(-1),
    }


def _shapes(setup: Setup, arrays: dict[str, jax.Array]) -> dict[str, tuple]:
    """Shape and dtype of every result."""
    plan, x, f32 = setup.plan, arrays["x"], jnp.float32
    parts = (plan.batch, plan.head_blocks, x.shape[2], plan.d_state)
    return {
        "dx": (x.shape, x.dtype),
        "dz": (x.shape, x.dtype),
        "sums": ((plan.batch, plan.head_blocks * setup.strips, setup.sums, setup.strip), f32),
        "d_past": (arrays["past"].shape, x.dtype),
        "d_scale": (arrays["scale"].shape, f32),
        "d_log_decay": (arrays["log_decay"].shape, f32),
        "dB": (parts, f32),
        "dC": (parts, f32),
        "dD": (arrays["overlap"].shape, f32),
        "d_initial": (arrays["d_final"].shape, f32),
    }


def _specs(setup: Setup) -> dict[str, pl.BlockSpec]:
    """Every array a step late, but x."""

    def late(spec: pl.BlockSpec) -> pl.BlockSpec:
        index = spec.index_map
        assert index is not None
        return pl.BlockSpec(spec.block_shape, lambda b, h, s: index(b, h, jnp.maximum(s - 1, 0)))

    plan = setup.plan
    ahead = pl.BlockSpec(
        (None, plan.rows, plan.chunk), lambda b, h, s: (b, h, jnp.maximum(plan.chunks - 1 - s, 0))
    )
    return {kind: late(spec) for kind, spec in setup.specs(reverse=True).items()} | {"ahead": ahead}


def _scratch(setup: Setup, dtype) -> dict[str, Any]:
    plan, f32 = setup.plan, jnp.float32
    block, by_head = (plan.rows, plan.chunk), (setup.parts, setup.part, plan.chunk)
    shapes = {
        "now": (block, dtype),
        "mixed": (block, dtype),
        "slope": (block, dtype),
        "y": (block, f32),
        "d": ((setup.part_rows, plan.chunk), f32),
        "after": (block, f32),
        "reach_after": ((SUBLANES, plan.chunk), jnp.int32),
        "along": ((SUBLANES, plan.chunk), f32),
        "alpha": (by_head, f32),
        "d_alpha": (by_head, f32),
        "scores": ((plan.chunk, plan.chunk), f32),
        "d_scores": ((plan.chunk, plan.chunk), f32),
        "dR": ((plan.rows, plan.d_state), f32),
        "carried": ((setup.parts, setup.part, 1), f32),
        "wide": ((setup.width + 2, plan.rows, LANES), f32),
    }
    return {name: pltpu.VMEM(*shape) for name, shape in shapes.items()}

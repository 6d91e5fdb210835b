"""The forward of a Mamba-2 layer for TPU: x is convolved, and y gated and normalised, in fast memory."""

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
    silu,
    taps,
    visible,
    widen,
)
from pallas_kernels.mosaic import LANES, SUBLANES, dot
from pallas_kernels.ssd import tpu_chunk
from pallas_kernels.ssd.tpu_chunk import by_head, decays, over_channels, through
from pallas_kernels.ssd.tpu_forward import write_output

# What comes in, by the kind of its block ("row" and "counts" with segments only), and what goes out.
INPUTS = {"x": "channels", "z": "channels", "columns": "columns", "past": "past", "scale": "parts"}
INPUTS |= {"log_decay": "heads", "B": "group", "C": "group", "D": "skip", "initial": "state"}
PACKED = {"reach": "row", "counts": "counts"}
OUTPUTS = {"y": "channels", "final": "state"}
SAVED = {"starts": "starts", "inverse": "block_row"}


def _kernel(*refs, setup: Setup, names: tuple[str, ...]):
    ref: Any = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
    plan, step = setup.plan, pl.program_id(2)
    reach = ref.reach[...] if plan.packed else None
    counts = ref.counts[...] if plan.packed else None

    @pl.when(step == 0)
    def _():
        ref.state[...] = ref.initial[...]
        ref.before[...] = ref.past[...]
        widen(setup, ref.columns, ref.wide)

    B, C = ref.B[...], ref.C[...]
    keep_alpha(setup, ref.alpha, ref.log_decay)
    ref.scores[...] = jnp.where(tpu_chunk.visible(plan.chunk, counts), dot(B, C, (1, 1)), 0.0)
    ref.squares[...] = jnp.zeros_like(ref.squares)

    def part(i, rows):
        setup.for_strips(i, rows, functools.partial(_mix, ref, setup, reach))
        x, scale, R = by_head(ref.mixed[...], setup.part), ref.scale[i], ref.state[rows, :]
        if "starts" in names:
            ref.starts[rows, :] = R.astype(ref.starts.dtype)
        decay = decays(ref.alpha[i], counts)
        write_output(ref.part, x, scale, ref.scores[...], C, ref.D[i], R, decay)
        written = dot(over_channels(x, decay.to_end * scale, B.dtype), B, (1, 0))
        ref.state[rows, :] = through(R, decay) + written
        setup.for_strips(i, rows, functools.partial(_gate, ref, setup, reach))

    setup.for_parts(part)
    if setup.norm:
        squares = jnp.sum(ref.squares[...], axis=0, keepdims=True)
        inverse = jax.lax.rsqrt(squares * (1 / plan.rows) + setup.eps)
        if "inverse" in names:
            ref.inverse[...] = inverse

        def scale(rows, *_):
            weight = columns_of(ref.wide, rows, plan.chunk)[setup.width + 1]
            ref.y[rows, :] = (ref.gated[rows, :] * inverse * weight).astype(ref.y.dtype)

        setup.for_parts(lambda i, rows: setup.for_strips(i, rows, scale))

    @pl.when(step == plan.chunks - 1)
    def _():
        ref.final[...] = ref.state[...]


def _mix(ref: Any, setup: Setup, reach, rows, within, _) -> None:
    """Convolution and SiLU of a strip."""
    inputs = taps(ref.before[rows, :], ref.x[rows, :], reach, setup.width)
    mixed = silu(before_activation(inputs, columns_of(ref.wide, rows, setup.plan.chunk)))
    ref.mixed[within, :] = visible(mixed, reach).astype(ref.mixed.dtype)
    ref.before[rows, :] = ref.x[rows, :]


def _gate(ref: Any, setup: Setup, reach, rows, within, _) -> None:
    """The gate of a strip, and its sums of squares for the norm."""
    gated = visible(ref.part[within, :] * silu(ref.z[rows, :].astype(jnp.float32)), reach)
    if setup.norm:
        ref.gated[rows, :] = gated
        ref.squares[...] += fold(gated * gated)
    else:
        ref.y[rows, :] = gated.astype(ref.y.dtype)


def forward(setup: Setup, arrays: dict[str, jax.Array], *, save: bool) -> dict[str, jax.Array]:
    """By the names of ``OUTPUTS`` and, to ``save`` for the backward, of ``SAVED``:

    y [B, H*P, L] after the norm, the final state, the chunk-start states in the dtype of B, and with a norm
    1 / rms [B, H/block, 1, L].

    Args:
        arrays: by the names of ``INPUTS`` and with segments ``PACKED``: x, z [B, H*P, L], the others as in
            :meth:`Setup.specs` (``past`` in the last K-1 of its tokens) and ``ssd/tpu_forward.py``.
    """
    plan, specs, f32 = setup.plan, setup.specs(), jnp.float32
    x, state = arrays["x"], arrays["initial"]
    arrays = arrays | {
        "scale": setup.split_parts(arrays["scale"]),
        "log_decay": plan.split_heads(arrays["log_decay"]),
        "D": setup.split_parts(arrays["D"][:, None]),
    }
    inputs = INPUTS | (PACKED if plan.packed else {})
    shapes = {
        "y": (x.shape, x.dtype),
        "final": (state.shape, f32),
        "starts": ((plan.batch, plan.chunks, *state.shape[1:]), arrays["B"].dtype),
        "inverse": ((plan.batch, plan.head_blocks, 1, x.shape[2]), f32),
    }
    outputs = OUTPUTS | (SAVED if save else {})
    if not setup.norm:
        outputs = {name: kind for name, kind in outputs.items() if name != "inverse"}
    scratch = _scratch(setup, x.dtype)
    results = mosaic.tpu_call(
        functools.partial(_kernel, setup=setup, names=(*inputs, *outputs, *scratch)),
        name="gated_ssd_forward",
        grid=(plan.batch, plan.head_blocks, plan.chunks),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[specs[kind] for kind in inputs.values()],
        out_specs=[specs[kind] for kind in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(*shapes[name]) for name in outputs],
        scratch_shapes=list(scratch.values()),
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
        interpret=plan.interpret,
    )(*(arrays[name] for name in inputs))
    return dict(zip(outputs, results))


def _scratch(setup: Setup, dtype) -> dict[str, Any]:
    plan, f32 = setup.plan, jnp.float32
    block, part = (plan.rows, plan.chunk), (setup.part_rows, plan.chunk)
    shapes = {
        "state": ((plan.rows, plan.d_state), f32),
        "before": (block, dtype),
        "wide": ((setup.width + 2, plan.rows, LANES), f32),
        "alpha": ((setup.parts, setup.part, plan.chunk), f32),
        "scores": ((plan.chunk, plan.chunk), f32),
        "mixed": (part, dtype),
        "part": (part, f32),
        "squares": ((SUBLANES, plan.chunk), f32),
    }
    if setup.norm:
        shapes["gated"] = (block, f32)
    return {name: pltpu.VMEM(*shape) for name, shape in shapes.items()}

"""Calls of kernels at given shapes, for :mod:`benchmarks.static_cycles` to compile: (function, arguments)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import mamba2, tuning
from pallas_kernels.causal_conv1d import causal_conv1d as conv_op
from pallas_kernels.selective_scan import selective_scan as scan_op
from pallas_kernels.ssd import ssd as ssd_op


def ssd(
    batch: int = 1,
    length: int = 8192,
    heads: int = 80,
    headdim: int = 64,
    d_state: int = 128,
    groups: int = 1,
    dtype: str = "bfloat16",
    packed: bool = False,
    backward: bool = False,
    chunk_size: int | None = None,
    **blocks: int,
) -> tuple[Callable, tuple]:
    """SSD of Mamba-2 (2.7B by default), or its gradient; ``blocks`` are block sizes of the kernels."""

    def run(ids, x, dt, A, B, C, D):
        with tuning.forced("ssd", blocks):
            op = functools.partial(ssd_op, chunk_size=chunk_size, implementation="pallas_tpu")
            return op(x, dt, A, B, C, D, segment_ids=ids)

    def gradient(ids, cotangents, *inputs):
        return jax.vjp(functools.partial(run, ids), *inputs)[1](cotangents)

    def of(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    x = of(batch, length, heads, headdim, dtype=jnp.dtype(dtype))
    B = of(batch, length, groups, d_state, dtype=jnp.dtype(dtype))
    inputs = (x, of(batch, length, heads), of(heads), B, B, of(heads))
    ids = of(batch, length, dtype=jnp.int32) if packed else None
    if not backward:
        return run, (ids, *inputs)
    return gradient, (ids, (x, of(batch, heads, headdim, d_state)), *inputs)


def gated_ssd(
    length: int = 8192,
    heads: int = 80,
    headdim: int = 64,
    d_state: int = 128,
    groups: int = 1,
    dtype: str = "bfloat16",
    packed: bool = False,
    backward: bool = False,
    fused: bool = True,
    **blocks: int,
) -> tuple[Callable, tuple]:
    """The op of a Mamba-2 layer (2.7B by default), convolution to gated norm, or it and its gradient.

    ``fused``: one kernel, else a kernel for each op. ``blocks`` are block sizes of the SSD kernels.
    """

    def of(*shape: int, dtype=jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    channels, states, low = heads * headdim, groups * d_state, jnp.dtype(dtype)
    sizes = {"x": channels, "B": states, "C": states}
    mixed = {name: of(1, length, size, dtype=low) for name, size in sizes.items()}
    inputs = mamba2.Inputs(z=mixed["x"], dt=of(1, length, heads, dtype=low), **mixed)
    conv = {name: (of(4, size), of(size)) for name, size in sizes.items()}
    weights = mamba2.Weights(conv, of(heads), of(heads), of(heads), of(channels))
    ids = of(1, length, dtype=jnp.int32) if packed else None
    nothing = dict.fromkeys(sizes)

    def run(ids, inputs, weights):
        with tuning.forced("gated_ssd" if fused else "ssd", blocks):
            if fused:
                op = functools.partial(mamba2.gated_ssd, segment_ids=ids, implementation="pallas_tpu")
                return op(inputs, weights, mamba2.Form(groups))[0]
            chain = mamba2.unfused.gated_ssd
            return chain(
                inputs, weights, nothing, None, ids, mamba2.Form(groups), implementation="pallas_tpu"
            )[0]

    def both(ids, dy, inputs, weights):
        y, vjp = jax.vjp(functools.partial(run, ids), inputs, weights)
        return y, vjp(dy)

    return (both, (ids, inputs.x, inputs, weights)) if backward else (run, (ids, inputs, weights))


def causal_conv1d(
    length: int = 8192,
    channels: int = 5120,
    width: int = 4,
    dtype: str = "bfloat16",
    backward: bool = False,
    implementation: str = "pallas_tpu",
) -> tuple[Callable, tuple]:
    """The convolution of x of a Mamba-2 layer (2.7B by default) standing alone, or it and its gradient."""
    x = jax.ShapeDtypeStruct((1, length, channels), jnp.dtype(dtype))
    weight, bias = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((width, channels), (channels,)))

    def run(*inputs):
        return conv_op(*inputs, activation="silu", implementation=implementation)[0]

    return _with_gradient(run, x, (x, weight, bias)) if backward else (run, (x, weight, bias))


def selective_scan(
    length: int = 2048,
    channels: int = 1536,
    d_state: int = 16,
    dtype: str = "bfloat16",
    backward: bool = False,
) -> tuple[Callable, tuple]:
    """The recurrence of Mamba-1 (130M by default), or it and its gradient."""

    def of(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    x, B = (of(1, length, size, dtype=jnp.dtype(dtype)) for size in (channels, d_state))
    inputs = (x, of(1, length, channels), of(channels, d_state), B, B, of(channels))

    def run(*inputs):
        return scan_op(*inputs, implementation="pallas_tpu")[0]

    return _with_gradient(run, x, inputs) if backward else (run, inputs)


def _with_gradient(run: Callable, cotangent: Any, inputs: tuple) -> tuple[Callable, tuple]:
    def both(cotangent, *inputs):
        y, vjp = jax.vjp(run, *inputs)
        return y, vjp(cotangent)

    return both, (cotangent, *inputs)

"""Calls of kernels at given shapes, for :mod:`benchmarks.static_cycles` to compile: (function, arguments)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
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

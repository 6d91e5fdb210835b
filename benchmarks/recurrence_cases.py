"""Calls of recurrences for :mod:`benchmarks.static_cycles` and :mod:`benchmarks.case_bytes` to compile.

Each returns (function, arguments), of shapes only: the linear recurrence of S4D and what it replaced, and one
token of Mamba-1 and Mamba-2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.lti_ssm import lti_ssm as lti_ssm_op
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd
from pallas_kernels.vandermonde import vandermonde as vandermonde_op

Case = tuple[Callable, tuple]


def lti_ssm(
    batch: int = 16,
    length: int = 4096,
    heads: int = 256,
    d_state: int = 64,
    packed: bool = False,
    backward: bool = False,
    implementation: str | None = None,
    **blocks: int,
) -> Case:
    """The diagonal recurrence, or it and its gradient; ``d_state`` counts complex states."""
    u, matrix = _of(batch, length, heads), _of(heads, d_state, dtype=jnp.complex64)
    state = _of(batch, heads, d_state, dtype=jnp.complex64)
    ids = _of(batch, length, dtype=jnp.int32) if packed else None

    def run(ids, u, log_A, B, C, state):
        with tuning.forced("lti_ssm", blocks):
            op = functools.partial(lti_ssm_op, implementation=implementation)
            return op(u, log_A, B, C, initial_state=state, segment_ids=ids)

    def both(ids, cotangents, *inputs):
        outputs, vjp = jax.vjp(functools.partial(run, ids), *inputs)
        return outputs, vjp(cotangents)

    inputs = (u, matrix, matrix, matrix, state)
    return (both, (ids, (u, state), *inputs)) if backward else (run, (ids, *inputs))


def vandermonde(heads: int = 256, d_state: int = 64, length: int = 4096, backward: bool = False) -> Case:
    """The kernel of a diagonal system, or it and its gradient."""
    matrix = _of(heads, d_state, dtype=jnp.complex64)

    def run(coefficients, log_A):
        return vandermonde_op(coefficients, log_A, length)

    def both(dK, *inputs):
        K, vjp = jax.vjp(run, *inputs)
        return K, vjp(dK)

    return (both, (_of(heads, length), matrix, matrix)) if backward else (run, (matrix, matrix))


def selective_scan_token(batch: int = 1, channels: int = 5120, d_state: int = 16) -> Case:
    """One token of Mamba-1 (2.8B by default)."""
    x, vector = _low(batch, 1, channels), _low(batch, 1, d_state)
    A, state = _of(channels, d_state), _of(batch, channels, d_state)
    inputs = (x, _of(batch, 1, channels), A, vector, vector, _of(channels))
    return _with_state(selective_scan), (state, *inputs)


def ssd_token(batch: int = 1, heads: int = 80, headdim: int = 64, d_state: int = 128) -> Case:
    """One token of Mamba-2 (2.7B by default)."""
    x, vector = _low(batch, 1, heads, headdim), _low(batch, 1, 1, d_state)
    inputs = (x, _of(batch, 1, heads), _of(heads), vector, vector, _of(heads))
    return _with_state(ssd), (_of(batch, heads, headdim, d_state), *inputs)


def _with_state(op: Callable) -> Callable:
    return lambda state, *inputs: op(*inputs, initial_state=state)


def _of(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _low(*shape: int) -> jax.ShapeDtypeStruct:
    return _of(*shape, dtype=jnp.bfloat16)

"""How every TPU kernel here is called: one place for what differs between versions of Pallas.

``interpret`` runs a kernel on any host: ``True`` quickly, ``pltpu.InterpretParams(detect_races=True)`` with
a simulation of the chip's memories that finds races and reads of memory nobody wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Semantics = Literal["parallel", "arbitrary"]
Interpret = bool | pltpu.InterpretParams
LANES, SUBLANES = 128, 8
MiB = 2**20


def tpu_call(
    kernel: Callable,
    *,
    name: str,
    grid: tuple[int, ...],
    semantics: tuple[Semantics, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    scratch_shapes: Sequence = (),
    scalars: int = 0,
    vmem_limit_bytes: int | None = None,
    cost: pl.CostEstimate | None = None,
    interpret: Interpret = False,
) -> Callable:
    """``pl.pallas_call`` for TPU.

    Args:
        name: appears in profiles, HLO and the compiler's dumps.
        semantics: "parallel" or "arbitrary" (a carry crosses it: walked in order) for each axis of ``grid``.
        scalars: how many leading arguments are tables of int32 that the index maps may read (their last
            arguments) and that the kernel gets first.
        vmem_limit_bytes: for pipelined blocks and spills; None for the compiler's 16 MiB (v5e, v5p) or 32.
    """
    parameters = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_limit_bytes)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=grid,
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            scratch_shapes=list(scratch_shapes),
        ),
        out_shape=list(out_shape),
        compiler_params=parameters,
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matrix product over axis ``contract[0]`` of ``a`` and ``contract[1]`` of ``b``, in float32.

    bfloat16 operands take one pass through the matrix unit. float32 operands take the six that give float32
    precision: the default precision would silently round them to bfloat16.
    """
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def sigmoid(x: jax.Array) -> jax.Array:
    """The logistic function as one hyperbolic tangent, for which the chip has an instruction."""
    return 0.5 * jnp.tanh(0.5 * x) + 0.5


def quotient(a: jax.Array, n: int) -> jax.Array:
    """``a // n`` of numbers that are not negative.

    Lowering ``//`` and ``%`` asks which chip is there (for the sign), and fails on a host that has none.
    """
    return jax.lax.div(a, jnp.full_like(a, n))


def remainder(a: jax.Array, n: int) -> jax.Array:
    """``a % n``, likewise."""
    return jax.lax.rem(a, jnp.full_like(a, n))

"""Complex numbers where a kernel has none: a number is a tuple of planes, (re,) or (re, im).

The same kernel then serves both; gradients follow JAX's convention (products are transposed, not conjugated).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Planes = tuple[jax.Array, ...]


def split(z: jax.Array) -> Planes:
    """The planes of an array, real or complex."""
    return (z.real, z.imag) if jnp.iscomplexobj(z) else (z,)


def join(planes: Planes) -> jax.Array:
    """The array of its planes: ``join(split(z)) == z``."""
    return jax.lax.complex(*planes) if len(planes) == 2 else planes[0]


def each(f: Callable[..., jax.Array], *numbers: Planes) -> Planes:
    """``f`` of every plane: for what is linear and real, such as a sum, a shift or a mask."""
    return tuple(f(*planes) for planes in zip(*numbers, strict=True))


def add(x: Planes, y: Planes) -> Planes:
    """The sum."""
    return each(jnp.add, x, y)


def multiply(x: Planes, y: Planes) -> Planes:
    """The product; where only one of the two is complex, so is the product."""
    if len(x) == len(y) == 2:
        return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]
    if len(x) < len(y):
        x, y = y, x
    return tuple(plane * y[0] for plane in x)

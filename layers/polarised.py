"""Channels that remember everything and nothing, beside the learned ones (arXiv:2501.00658)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

FORGETS = -100.0  # decay rate of a channel that keeps exp(-100 dt) from token to token, next to nothing


def polarised(A: Float[Array, "*e N"], ones: int, zeros: int) -> Float[Array, "*e M"]:
    """[0, ..., 0 | A | -100, ..., -100] along the last axis, with ``ones`` and ``zeros`` of them: M in all.

    Over a step dt the first keep everything, exp(0) = 1, the last next to nothing.
    """
    if not ones and not zeros:
        return A
    first, last = (
        jnp.full((*A.shape[:-1], count), rate, A.dtype) for count, rate in ((ones, 0.0), (zeros, FORGETS))
    )
    return jnp.concatenate([first, A, last], axis=-1)


def check_polarised(field: str, ones: int, zeros: int, below: int | None = None) -> None:
    """Raises ValueError if there cannot be so many, beside learned ones out of ``below`` in all."""
    if min(ones, zeros) < 0 or (below is not None and ones + zeros >= below):
        most = "" if below is None else f", together below the number of heads, {below}"
        raise ValueError(f"{field}.ones={ones} and {field}.zeros={zeros} should be at least 0{most}")

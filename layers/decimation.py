"""DeciMamba (arXiv:2406.14528): which tokens of a prompt the layers after this one still read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def importance(dt: Float[Array, "B L H"]) -> Float[Array, "B L"]:
    """Norm of a token's step sizes: how much of it is written, and of the past forgotten."""
    return jnp.sqrt(jnp.sum(jnp.square(dt), axis=-1))


def kept_places(
    score: Float[Array, "B L"], keep: int, tail: int, segment_ids: Int[Array, "B L"] | None = None
) -> Int[Array, "B K"]:
    """Where the last ``tail`` real tokens of each row stand, and the ``keep`` others that score highest.

    In the order of time; K = min(keep + tail, L). A row with fewer real tokens keeps padding too.
    """
    real = jnp.ones(score.shape, bool) if segment_ids is None else segment_ids != 0
    after = jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1]  # real tokens from here on
    score = jnp.where(after <= tail, jnp.inf, score)
    score = jnp.where(real, score, -jnp.inf)
    _, places = jax.lax.top_k(score, min(keep + tail, score.shape[1]))
    return jnp.sort(places, axis=1).astype(jnp.int32)

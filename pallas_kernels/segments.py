"""Segment ids as ops read them: 0 is padding and transparent, any other change of id is a reset."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def reset_runs(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """How many resets lie at or before each token: never falling, 0 in the segment of the first real token.

    Padding takes the run of the last real token before it (0 where there is none).
    """
    real = segment_ids != 0
    last = jax.lax.cummax(jnp.where(real, jnp.arange(segment_ids.shape[1]), -1), axis=1)
    last_before = jnp.concatenate([jnp.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(last_before, 0), axis=1)
    reset = real & (last_before >= 0) & (segment_ids != id_before)
    return jnp.cumsum(reset, axis=1, dtype=jnp.int32)

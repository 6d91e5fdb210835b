"""The truth for SSD: the recurrence of Mamba-2 (arXiv:2405.21060), one token at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ssd_core(
    u: Float[Array, "B L H P"],
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    initial_state: Float[Array, "B H P N"],
    runs: Int[Array, "B L"] | None,
    chunk_size: int,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """S_t = exp(log_decay_t) S_{t-1} + u_t B_t^T,  y_t = S_t C_t; S is zero where ``runs`` changes.

    ``runs`` counts resets: it never falls, and run 0 continues ``initial_state``. ``chunk_size`` is unused.
    Results have the dtype of ``initial_state`` (float32 or wider).
    """
    dtype = initial_state.dtype
    heads_per_group = u.shape[2] // B.shape[2]
    u, a, B, C = (t.astype(dtype) for t in (u, log_decay, B, C))
    B, C = (jnp.repeat(t, heads_per_group, axis=2) for t in (B, C))
    runs = jnp.zeros(u.shape[:2], jnp.int32) if runs is None else runs
    reset = jnp.diff(runs, axis=1, prepend=0) != 0

    def step(S, token):
        u_t, a_t, B_t, C_t, reset_t = token
        S = jnp.where(reset_t[:, None, None, None], 0, S)
        S = jnp.exp(a_t)[..., None, None] * S + jnp.einsum("bhp,bhn->bhpn", u_t, B_t)
        return S, jnp.einsum("bhpn,bhn->bhp", S, C_t)

    tokens = jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), (u, a, B, C, reset))
    final_state, y = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(y, 0, 1), final_state

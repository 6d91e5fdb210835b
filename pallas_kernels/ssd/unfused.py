"""What ``reference`` and ``xla`` leave to XLA and a kernel does itself: u = scale x before, D x after.

Every implementation of the op is a function of (x, scale, log_decay, B, C, D, state, runs, chunk_size):

    x [B, L, H, P], B and C [B, L, G, N]: matrix operands. scale [B, L, H], or None for 1 (then x is u).
    log_decay [B, L, H], D [H] or None, state [B, H, P, N]: float32 or wider.
    runs [B, L]: int32 counts of resets (``segments.reset_runs``), or None. chunk_size: None for its own.

and returns y [B, L, H, P] in the dtype of x and the final state in the dtype of ``state``.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """u = scale x [B, L, H, P] in the dtype of x."""
    if scale is None:
        return x
    # As a product with batch axes only, so that the gradient of scale is a product too: on CPU the sum over
    # P that a broadcast would give takes as long as half the backward.
    return jnp.einsum("blh,blhp->blhp", scale, x.astype(scale.dtype)).astype(x.dtype)


def default_chunk(d_state: int) -> int:
    """The fastest on CPU for a training step (64, 128, 256 measured)."""
    return 128 if d_state >= 128 else 64


def unfused(core: Callable) -> Callable:
    """``core(u, log_decay, B, C, state, runs, chunk_size)`` as an implementation of the op."""

    def run(x, scale, log_decay, B, C, D, state, runs, chunk_size):
        chunk = chunk_size or default_chunk(B.shape[3])
        y, state = core(scaled(x, scale), log_decay, B, C, state, runs, chunk)
        if D is not None:
            y += D.astype(y.dtype)[:, None] * x
        return y.astype(x.dtype), state

    return run

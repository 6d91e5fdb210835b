"""The selective scan on a GPU: channels across threads, the N states of a channel in a thread's registers.

Not yet run on a GPU (see ``pallas_kernels/mosaic_gpu.py``). A block walks one row of the batch and 128
channels. The forward keeps the state every 128 / N tokens; from these the backward computes the states again.
Its sums over channels, dB and dC, are left by each block for itself.

N is padded to a power of two, the channels of each group to a multiple of 128, L to whole tiles (dt = 0).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from pallas_kernels.dispatch import unsuitable
from pallas_kernels.mosaic_gpu import THREADS
from pallas_kernels.selective_scan.gpu_kernels import TOKENS, backward, forward

MIN_STATE = 8  # with fewer, a tile of 128 / N tokens would not fit into shared memory
MAX_STATE = 64


def unsupported(x, dt, A, B, C, state, runs) -> str | None:
    """Why the kernels cannot take the call, or None."""
    if reason := unsuitable({"A": A, "B": B, "C": C}, jnp.float32, jnp.bfloat16, jnp.float16):
        return reason
    if reason := unsuitable({"the state": state}, jnp.float32, advice="give dt and A in float32"):
        return reason
    if A.shape[1] > MAX_STATE:
        return f"N = {A.shape[1]} is more than {MAX_STATE}, what a thread keeps in registers"
    return None


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Inexact[Array, "E N"],
    B: Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    C: Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    initial_state: Inexact[Array, "B E N"],
    runs: Int[Array, "B L"] | None,
    interpret: Any = None,
) -> tuple[Float[Array, "B L E"], Inexact[Array, "B E N"]]:
    """Same contract as ``reference.selective_scan``, for calls that :func:`unsupported` takes."""
    length, (channels, d_state) = x.shape[1], A.shape
    # Pieces of channels that are of one group in B and in C.
    pieces = math.lcm(*(t.shape[2] if t.ndim == 4 else 1 for t in (B, C)))
    states = max(MIN_STATE, 1 << (d_state - 1).bit_length()) - d_state

    def by_channel(t, axis):
        """Axis of E channels padded, piece by piece."""
        width = channels // pieces
        if width % THREADS == 0:
            return t
        t = t.reshape(*t.shape[:axis], pieces, width, *t.shape[axis + 1 :])
        return _pad(t, axis + 1, -width % THREADS).reshape(*t.shape[:axis], -1, *t.shape[axis + 2 :])

    def by_state(t):
        """B or C in float32: [B, L, G, N], or [N, E] where it is constant."""
        t = _pad(t.astype(jnp.float32), t.ndim - 1, states)
        return _pad(t, 1, -length % TOKENS) if t.ndim == 4 else by_channel(t.T, 1)

    runs = jnp.zeros(x.shape[:2], jnp.int32) if runs is None else runs
    resets = _pad((jnp.diff(runs, axis=1, prepend=0) != 0).astype(jnp.float32), 1, -length % TOKENS)
    x, dt = (_pad(by_channel(t, 2), 1, -length % TOKENS) for t in (x, dt.astype(jnp.float32)))
    A = by_channel(_pad(A.astype(jnp.float32), 1, states).T, 1)
    state = by_channel(_pad(initial_state, 2, states).swapaxes(1, 2), 2)
    # N times, because a copy of 128 / N tokens of one number each would be too short.
    keep = jnp.repeat(1 - resets[..., None], A.shape[0], axis=2)
    y, final = _scan(x, dt, A, by_state(B), by_state(C), state, keep, interpret)

    def back(t):
        return t.reshape(*t.shape[:2], pieces, -1)[..., : channels // pieces].reshape(*t.shape[:2], channels)

    return back(y)[:, :length], back(final)[:, :d_state].swapaxes(1, 2)


def _pad(t: jax.Array, axis: int, size: int) -> jax.Array:
    return jnp.pad(t, [(0, size if a == axis else 0) for a in range(t.ndim)]) if size else t


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(x, dt, A, B, C, state, keep, interpret):
    y, final = forward(x, dt, A, B, C, state, keep, save_states=False, interpret=interpret)
    return y, final


def _forward(x, dt, A, B, C, state, keep, interpret):
    y, final, starts = forward(x, dt, A, B, C, state, keep, save_states=True, interpret=interpret)
    return (y, final), (x, dt, A, B, C, keep, starts)


def _backward(interpret, residuals, cotangents):
    *_, B, C, _, _ = residuals
    gradients = backward(*residuals, *cotangents, interpret=interpret)
    dx, d_dt, dA, dB, dC, d_state = gradients
    dB, dC = (_sum_blocks(d, like) for d, like in ((dB, B), (dC, C)))
    return dx, d_dt, dA.sum(axis=0), dB, dC, d_state, None


def _sum_blocks(parts: jax.Array, like: jax.Array) -> jax.Array:
    """Of each row [B, N, E], or of each block of channels [B, blocks, L N]."""
    if like.ndim == 2:
        return parts.sum(axis=0)
    batch, length, groups, d_state = like.shape
    return parts.reshape(batch, groups, -1, length, d_state).sum(axis=2).swapaxes(1, 2)


_scan.defvjp(_forward, _backward)

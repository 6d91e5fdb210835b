"""The selective scan in chunks: states of all tokens exist for one chunk at a time.

A chunk forms its decays and inputs [B, Q, E, N] in parallel, runs the linear scan over them, and reads out.
The backward keeps the chunk-start states only, and forms each chunk again (``jax.checkpoint``).

All products are einsums, also the outer ones: XLA on CPU then makes matrix products of their gradients,
where the sums that a broadcast would give run a scalar at a time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from pallas_kernels.linear_scan import xla as linear

CHUNK = 32  # tokens; 8 to 64 measured on CPU


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Inexact[Array, "E N"],
    B: Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    C: Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    initial_state: Inexact[Array, "B E N"],
    runs: Int[Array, "B L"] | None,
) -> tuple[Float[Array, "B L E"], Inexact[Array, "B E N"]]:
    """Same contract as ``reference.selective_scan``; any L (padded to whole chunks with dt = 0)."""
    length = x.shape[1]
    if length == 1:
        return _one_token(x, dt, A, B, C, initial_state)
    chunk = min(CHUNK, length)
    padding = -length % chunk
    resets = None if runs is None else jnp.diff(runs, axis=1, prepend=0) != 0
    # B and C of every token are scanned over with x and dt; constant ones stay outside of the scan.
    tokens = {"x": x, "dt": dt, "resets": resets}
    tokens |= {name: t for name, t in (("B", B), ("C", C)) if t.ndim == 4}
    constant = {name: t for name, t in (("B", B), ("C", C)) if t.ndim == 2}
    pieces = jax.tree.map(lambda t: _split(_pad_time(t, padding), chunk), tokens)

    def step(state, piece):
        return _chunk(A, state, **piece, **constant)

    step = step if length == chunk else jax.checkpoint(step)
    final_state, y = jax.lax.scan(step, initial_state, pieces)
    return jnp.moveaxis(y, 0, 1).reshape(x.shape[0], -1, x.shape[2])[:, :length], final_state


def _one_token(x, dt, A, B, C, state) -> tuple[jax.Array, jax.Array]:
    """Decoding. A single token always belongs to the incoming state (or is padding, and changes nothing).

    Apart from the chunks, because states in rows of E*N cost XLA for TPU a second pass over them.
    """
    x, dt, B, C = (t[:, 0] if t.ndim > 2 else t for t in (x, dt, B, C))
    decay, written = _decay_and_input(x, dt, A, B, state.dtype)
    h = decay * state + written
    return _read(h, C)[:, None], h


def _chunk(A, state, *, x, dt, B, C, resets) -> tuple[jax.Array, jax.Array]:
    """State after a chunk, and its y [B, Q, E]."""
    decay, written = _decay_and_input(x, dt, A, B, state.dtype)
    if resets is not None:
        decay = jnp.where(resets[..., None, None], 0, decay)
    rows = (t.reshape(*x.shape[:2], -1) for t in (decay, written))
    h, last = linear.linear_scan(*rows, state.reshape(x.shape[0], -1))
    return last.reshape(state.shape), _read(h.reshape(decay.shape), C)


def _decay_and_input(x, dt, A, B, dtype) -> tuple[jax.Array, jax.Array]:
    """exp(dt A) and dt x B [..., E, N] in the state's dtype; B is [..., G, N] or [E, N]."""
    A, B = A.astype(dtype), B.astype(dtype)
    x, dt = (t.astype(jnp.finfo(dtype).dtype) for t in (x, dt))
    u = (dt * x).astype(dtype)
    decay = jnp.exp(_product("...e,en->...en", dt.astype(dtype), A))
    if B.ndim == 2:
        return decay, _product("...e,en->...en", u, B)
    by_group = u.reshape(*u.shape[:-1], B.shape[-2], -1)
    return decay, _product("...gk,...gn->...gkn", by_group, B).reshape(decay.shape)


def _read(h: Inexact[Array, "*t E N"], C) -> Float[Array, "*t E"]:
    """y of states, in their own precision."""
    C = C.astype(h.dtype)
    if C.ndim == 2:
        y = _product("...en,en->...e", h, C)
    else:
        by_group = h.reshape(*h.shape[:-2], C.shape[-2], -1, h.shape[-1])
        y = _product("...gkn,...gn->...gk", by_group, C).reshape(h.shape[:-1])
    return 2 * y.real if jnp.iscomplexobj(y) else y


_product = functools.partial(jnp.einsum, precision="highest")  # exponents and states: never below float32


def _pad_time(t: jax.Array, padding: int) -> jax.Array:
    return jnp.pad(t, [(0, 0), (0, padding)] + [(0, 0)] * (t.ndim - 2)) if padding else t


def _split(t: jax.Array, chunk: int) -> jax.Array:
    """[B, L, ...] -> [L / Q, B, Q, ...]."""
    return jnp.moveaxis(t.reshape(t.shape[0], -1, chunk, *t.shape[2:]), 1, 0)

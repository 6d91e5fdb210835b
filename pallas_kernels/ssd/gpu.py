"""SSD as Pallas kernels for GPUs with warpgroup matrix products (Hopper): padding and differentiation.

Not yet run on a GPU (see ``pallas_kernels/mosaic_gpu.py``). Operands have 16 bits; decays, states and sums
are float32. For the backward the forward saves the state at the start of every chunk, in the operands' dtype:
the products would round it to that anyway.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import unsuitable
from pallas_kernels.ssd.gpu_backward import state_gradients, token_gradients
from pallas_kernels.ssd.gpu_chunk import CHANNELS, CHUNK, decays
from pallas_kernels.ssd.gpu_forward import forward
from pallas_kernels.ssd.unfused import unfused

OPERANDS = (jnp.bfloat16, jnp.float16)
COLUMNS = 64  # N is padded to a multiple: a swizzled row of 128 bytes
MAX_STATE = 128


def unsupported(x, scale, log_decay, B, C, D, state, runs, chunk_size) -> str | None:
    """Why the kernels cannot take the call, or None."""
    operand = jnp.result_type(x, B, C)
    if operand not in OPERANDS:
        return f"x, B and C promote to {operand}, and the matrix products take 16 bits; cast all to bfloat16"
    if reason := unsuitable({"the state": state}, jnp.float32, advice="give dt and A in float32"):
        return reason
    if B.shape[3] > MAX_STATE:
        return f"N = {B.shape[3]} is more than {MAX_STATE}, what fits in registers and shared memory"
    return None


def ssd(
    x: Float[Array, "B L H P"],
    scale: Float[Array, "B L H"] | None,
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, " H"] | None,
    state: Float[Array, "B H P N"],
    runs: Int[Array, "B L"] | None,
    chunk_size: int | None,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """The contract of ``ssd/unfused.py``, for calls that :func:`unsupported` takes; chunks have 64 tokens."""
    core = unfused(functools.partial(_core, interpret=interpret))
    return core(x, scale, log_decay, B, C, D, state, runs, chunk_size)


def _core(u, log_decay, B, C, state, runs, chunk_size, interpret):
    length, headdim, d_state = u.shape[1], u.shape[3], B.shape[3]
    operand = jnp.result_type(u, B, C)
    # Below the smallest normal number a decay is zero; the bound keeps cumulative sums precise behind such
    # a token.
    log_decay = jnp.maximum(log_decay, jnp.log(jnp.finfo(jnp.float32).tiny))
    tokens, channels, columns = -length % CHUNK, -headdim % CHANNELS, -d_state % COLUMNS
    u, B, C = (t.astype(operand) for t in (u, B, C))
    u, B, C = _pad(u, {1: tokens, 3: channels}), *(_pad(t, {1: tokens, 3: columns}) for t in (B, C))
    log_decay, state = _pad(log_decay, {1: tokens}), _pad(state, {2: channels, 3: columns})
    runs = None if runs is None else _pad(runs, {1: tokens}, mode="edge")
    y, final = _scan(u, log_decay, B, C, state, runs, interpret)
    return y[:, :length, :, :headdim], final[:, :, :headdim, :d_state]


def _pad(t: jax.Array, by_axis: dict[int, int], **mode) -> jax.Array:
    if not any(by_axis.values()):
        return t
    return jnp.pad(t, [(0, by_axis.get(axis, 0)) for axis in range(t.ndim)], **mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _scan(u, log_decay, B, C, state, runs, interpret):
    y, final = forward(u, B, C, decays(log_decay, runs), state, save_states=False, interpret=interpret)
    return y, final


def _forward(u, log_decay, B, C, state, runs, interpret):
    y, final, starts = forward(u, B, C, decays(log_decay, runs), state, save_states=True, interpret=interpret)
    return (y, final), (u, log_decay, B, C, runs, starts, final)


def _backward(interpret, residuals, cotangents):
    u, log_decay, B, C, runs, starts, final = residuals
    dy, d_final = cotangents
    chunk = decays(log_decay, runs)
    d_ends, overlap, d_state = state_gradients(dy, C, chunk, starts, d_final, interpret=interpret)
    du, d_alpha, dB, dC = token_gradients(u, dy, B, C, chunk, starts, d_ends, interpret=interpret)
    # <dS', S'> of a chunk is <dS, S> of the next one; all tokens of a chunk reach its end.
    at_end = jnp.sum(overlap, axis=3)
    at_end = jnp.concatenate([at_end[:, 1:], jnp.sum(d_final * final, axis=(2, 3))[:, None]], axis=1)
    by_chunk = d_alpha.sum(0).transpose(0, 2, 1).reshape(u.shape[0], -1, CHUNK, u.shape[2])
    d_log_decay = jax.lax.cumsum(by_chunk, axis=2, reverse=True) + at_end[:, :, None]
    dB, dC = (t.sum(axis=1).swapaxes(1, 2).astype(u.dtype) for t in (dB, dC))
    return du, d_log_decay.reshape(log_decay.shape), dB, dC, d_state, None


_scan.defvjp(_forward, _backward)

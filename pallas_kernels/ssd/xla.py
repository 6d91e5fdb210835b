"""SSD as a scan over chunks of matrix products, with its own backward (arXiv:2405.21060, section 6).

Within a chunk, with alpha the inclusive cumulative sum of log decays, R the state at its start and R' at
its end:

    y_i = sum_{j<=i} (C_i . B_j) e^(alpha_i - alpha_j) u_j + e^(alpha_i) R C_i
    R'  = e^(alpha_Q) R + sum_j e^(alpha_Q - alpha_j) u_j B_j^T

Only inputs, y and the chunk-start states are kept for the backward; scores are computed again. The decays'
gradient needs no [Q, Q] sums: alpha_i multiplies everything token i reads and divides everything it writes,
so

    d alpha_i = <dy_i, y_i> - <u_i, du_i>,  and at the end of the chunk + <dR', R'>.

Written for the way XLA compiles for CPU (and no worse elsewhere): one chunk at a time keeps the scores in
cache; all heads of a group share one matrix product with B or C (the state is held as [B, G, N, K*P], K
heads a group); and sums inside the loop are products with ones or a triangle, because there XLA computes
reductions, and an ``exp`` fused with the slicing of the loop's inputs, one scalar at a time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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
    """Same contract as ``reference.ssd_core``; any L (padded to whole chunks with tokens that do nothing)."""
    length, dtype = u.shape[1], initial_state.dtype
    if length == 1:
        return _one_step(u, log_decay, B, C, initial_state)
    operand = jnp.result_type(u, B, C)
    u, B, C = (t.astype(operand) for t in (u, B, C))
    # Below the smallest normal number a decay is zero; the bound keeps cumulative sums precise behind such
    # a token.
    log_decay = jnp.maximum(log_decay.astype(dtype), jnp.log(jnp.finfo(dtype).tiny))
    chunk = min(chunk_size, length)
    padding = -length % chunk
    if padding:
        u, log_decay, B, C = (_pad_time(t, padding) for t in (u, log_decay, B, C))
        runs = None if runs is None else _pad_time(runs, padding, mode="edge")
    resets = None if runs is None else (jnp.diff(runs, axis=1, prepend=0) != 0).astype(dtype)
    state = _to_group_layout(initial_state, B.shape[2])
    y, state = _chunk_scan(u, log_decay, B, C, state, resets, chunk)
    return y[:, :length], _from_group_layout(state, initial_state.shape)


def _pad_time(t: jax.Array, padding: int, **mode) -> jax.Array:
    return jnp.pad(t, [(0, 0), (0, padding)] + [(0, 0)] * (t.ndim - 2), **mode)


def _to_group_layout(state: jax.Array, groups: int) -> jax.Array:
    """[B, H, P, N] -> [B, G, N, K*P]."""
    return state.reshape(state.shape[0], groups, -1, state.shape[-1]).swapaxes(2, 3)


def _from_group_layout(state: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return state.swapaxes(2, 3).reshape(shape)


def _one_step(u, log_decay, B, C, state):
    """Decoding. A single token always belongs to the incoming state (or is padding, and changes nothing)."""
    batch, _, heads, headdim = u.shape
    groups, d_state = B.shape[2:]
    dtype = state.dtype
    u, a, B, C = (t[:, 0].astype(dtype) for t in (u, log_decay, B, C))
    by_group = (batch, groups, heads // groups, headdim)
    written = u.reshape(by_group)[..., None] * B[:, :, None, None, :]
    state = jnp.exp(a)[..., None, None] * state + written.reshape(state.shape)
    y = jnp.einsum("bgkpn,bgn->bgkp", state.reshape(*by_group, d_state), C)
    return y.reshape(batch, 1, heads, headdim), state


class _Decays(NamedTuple):
    """Decays of one chunk; from its start and to its end they are [B, G, Q, K*P]."""

    within: jax.Array  # e^(alpha_i - alpha_j) [B, G, K, Q, Q], zero for j > i or across a reset
    from_start: jax.Array
    to_end: jax.Array
    through: jax.Array  # [B, G, 1, K*P]


def _decays(log_decay, resets, headdim: int, groups: int, transpose: bool) -> _Decays:
    """``transpose`` gives ``within`` as [.., j, i]. Masks stand before every ``exp``."""
    batch, chunk, heads = log_decay.shape
    per_group = heads // groups
    causal = jnp.tril(jnp.ones((chunk, chunk), log_decay.dtype))
    alpha = jnp.einsum("bsh,qs->bhq", log_decay, causal, precision="highest")
    alpha = alpha.reshape(batch, groups, per_group, chunk)
    row, column = alpha[..., :, None], alpha[..., None, :]
    visible = causal.T > 0 if transpose else causal > 0
    from_start, to_end, through = alpha, alpha[..., -1:] - alpha, alpha[..., -1]
    if resets is not None:
        runs = jnp.einsum("bs,qs->bq", resets, causal, precision="highest")  # resets so far in this chunk
        visible = (visible & (runs[:, :, None] == runs[:, None, :]))[:, None, None]
        last = runs[:, -1:]
        from_start = jnp.where((runs == 0)[:, None, None], from_start, -jnp.inf)
        to_end = jnp.where((runs == last)[:, None, None], to_end, -jnp.inf)
        through = jnp.where((last == 0)[:, None], through, -jnp.inf)
    within = jnp.exp(jnp.where(visible, column - row if transpose else row - column, -jnp.inf))

    def over_channels(t):  # [B, G, K, Q] -> [B, G, Q, K*P]
        t = jnp.broadcast_to(
            jnp.exp(t).swapaxes(2, 3)[..., None], (*t.shape[:2], t.shape[3], per_group, headdim)
        )
        return t.reshape(*t.shape[:3], -1)

    return _Decays(
        within, over_channels(from_start), over_channels(to_end), over_channels(through[..., None])
    )


def _matmul(spec: str, x: jax.Array, y: jax.Array, like: jax.Array) -> jax.Array:
    """Operands in the dtype of ``like``, accumulated in float32 or wider."""
    accumulate = jnp.promote_types(like.dtype, jnp.float32)
    return jnp.einsum(spec, x.astype(like.dtype), y.astype(like.dtype), preferred_element_type=accumulate)


def _by_head(t: jax.Array) -> jax.Array:
    """[B, Q, G, K, P] -> [B, G, K, Q, P]."""
    return t.transpose(0, 2, 3, 1, 4)


def _by_group(t: jax.Array) -> jax.Array:
    """[B, Q, G, K, P] -> [B, G, Q, K*P]."""
    return t.swapaxes(1, 2).reshape(t.shape[0], t.shape[2], t.shape[1], -1)


def _merge_heads(t: jax.Array) -> jax.Array:
    """[B, G, K, Q, P] -> [B, G, Q, K*P]."""
    return t.swapaxes(2, 3).reshape(*t.shape[:2], t.shape[3], -1)


def _split(t: jax.Array, chunk: int) -> jax.Array:
    """[B, L, ...] -> [L / Q, B, Q, ...]."""
    return jnp.moveaxis(t.reshape(t.shape[0], -1, chunk, *t.shape[2:]), 1, 0)


def _join(t: jax.Array) -> jax.Array:
    """[L / Q, B, Q, ...] -> [B, L, ...]."""
    return jnp.moveaxis(t, 0, 1).reshape(t.shape[1], -1, *t.shape[3:])


def _chunks(u, log_decay, B, C, resets, chunk: int) -> tuple:
    """What is scanned over: u [B, Q, G, K, P], log_decay [B, Q, H], B and C [B, Q, G, N], resets [B, Q]."""
    grouped = u.reshape(*u.shape[:2], B.shape[2], -1, u.shape[-1])
    return jax.tree.map(lambda t: _split(t, chunk), (grouped, log_decay, B, C, resets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _chunk_scan(u, log_decay, B, C, state, resets, chunk):
    """State in group layout; u, B, C of one operand dtype; y and state float32 or wider."""
    return _forward(u, log_decay, B, C, state, resets, chunk)[0]


def _forward(u, log_decay, B, C, state, resets, chunk):
    def step(R, xs):
        u, log_decay, B, C, resets = xs
        decay = _decays(log_decay, resets, u.shape[-1], B.shape[2], transpose=False)
        B, C = B.swapaxes(1, 2), C.swapaxes(1, 2)
        scores = _matmul("bgin,bgjn->bgij", C, B, u)
        weights = scores[:, :, None] * decay.within
        y = _merge_heads(_matmul("bgkij,bgkjp->bgkip", weights, _by_head(u), u))
        y += _matmul("bgin,bgnc->bgic", C, R, u) * decay.from_start
        written = _matmul("bgjn,bgjc->bgnc", B, _by_group(u) * decay.to_end, u)
        return R * decay.through + written, (y.swapaxes(1, 2), R)

    final, (y, starts) = jax.lax.scan(step, state, _chunks(u, log_decay, B, C, resets, chunk))
    y = _join(y).reshape(u.shape)
    return (y, final), (u, log_decay, B, C, resets, y, starts, final)


def _backward(chunk, residuals, cotangents):
    u, log_decay, B, C, resets, y, starts, final = residuals
    dy, d_final = cotangents
    batch, _, heads, headdim = u.shape
    grouped = dy.reshape(*dy.shape[:2], B.shape[2], -1, headdim)
    ones = jnp.ones(B.shape[3], d_final.dtype)

    def step(dR, xs):  # scores and their gradients stand transposed, [.., j, i]
        (u, log_decay, B, C, resets), R, dy = xs
        decay = _decays(log_decay, resets, headdim, B.shape[2], transpose=True)
        B, C = B.swapaxes(1, 2), C.swapaxes(1, 2)
        dy_by_head = _by_head(dy)
        weights = _matmul("bgjn,bgin->bgji", B, C, u)[:, :, None] * decay.within
        d_weights = _matmul("bgkjp,bgkip->bgkji", _by_head(u), dy_by_head, u) * decay.within
        d_scores = _sum_heads(d_weights)
        wrote = _by_group(u) * decay.to_end
        dy_start = _by_group(dy) * decay.from_start
        du = _merge_heads(_matmul("bgkji,bgkip->bgkjp", weights, dy_by_head, u))
        du += _matmul("bgjn,bgnc->bgjc", B, dR, u) * decay.to_end
        dB = _matmul("bgji,bgin->bgjn", d_scores, C, u) + _matmul("bgjc,bgnc->bgjn", wrote, dR, u)
        dC = _matmul("bgji,bgjn->bgin", d_scores, B, u) + _matmul("bgic,bgnc->bgin", dy_start, R, u)
        dR = dR * decay.through + _matmul("bgin,bgic->bgnc", C, dy_start, u)
        overlap = jnp.einsum("n,bgnc->bgc", ones, dR * R, precision="highest")
        return dR, (du.swapaxes(1, 2), dB.swapaxes(1, 2), dC.swapaxes(1, 2), overlap)

    xs = (_chunks(u, log_decay, B, C, resets, chunk), starts, _split(grouped, chunk))
    d_state, (du, dB, dC, overlap) = jax.lax.scan(step, d_final, xs, reverse=True)
    du, dB, dC = _join(du).reshape(u.shape), _join(dB), _join(dC)
    at_end = jnp.concatenate([overlap[1:], jnp.sum(d_final * final, axis=2)[None]])  # <dR', R'> by channel
    at_end = jnp.moveaxis(at_end.reshape(-1, batch, heads, headdim).sum(-1), 0, 1)
    d_alpha = jnp.sum(dy * y - u * du, axis=-1).reshape(batch, -1, chunk, heads)
    causal = jnp.tril(jnp.ones((chunk, chunk), d_alpha.dtype))
    d_log_decay = jnp.einsum("bcsh,sq->bcqh", d_alpha, causal, precision="highest") + at_end[:, :, None]
    like_input = (
        du.astype(u.dtype),
        d_log_decay.reshape(log_decay.shape),
        dB.astype(B.dtype),
        dC.astype(C.dtype),
    )
    return (*like_input, d_state, None)


def _sum_heads(t: jax.Array) -> jax.Array:
    """[B, G, K, Q, Q] -> [B, G, Q, Q]."""
    flat = t.reshape(*t.shape[:3], -1)
    total = jnp.einsum("k,bgkx->bgx", jnp.ones(t.shape[2], t.dtype), flat, precision="highest")
    return total.reshape(*t.shape[:2], *t.shape[3:])


_chunk_scan.defvjp(_forward, _backward)

"""LTI state-space recurrences by chunks of Q tokens: matrix products with tables that all rows share.

With K_l = C A^l B and R_c the state before chunk c,

    y_i     = sum_{j<=i} K_{i-j} u_j + C A^(i+1) R_c
    R_{c+1} = A^Q R_c + sum_j A^(Q-1-j) B u_j

Padding is moved behind the real tokens first, so these lags hold with padding too, and only the state after
the last real token needs a power of A known at run time. Segments keep the products shared: the part of a
Toeplitz matrix below the diagonal is cut into square blocks between neighbours of 1, 2, 4, ... tokens, and
across the boundary of two neighbours at most one segment continues, so its mask is a product of a mask of
sources and a mask of targets.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Int

from pallas_kernels.lti_ssm import tables
from pallas_kernels.lti_ssm.compact import compact, permute

CHUNK = 64  # 32, 64, 128, 256 measured on CPU for a training step: 64 and 128 are the fastest
# Float32 on every platform: cheap beside the memory traffic, and equal to the convolution in training.
_product = functools.partial(jnp.einsum, precision="highest")


def lti_ssm(
    u: Float[Array, "B L H"],
    log_A: Complex[Array, "H N"],
    B: Complex[Array, "H N"],
    C: Complex[Array, "H N"],
    initial_state: Complex[Array, "B H N"],
    segment_ids: Int[Array, "B L"] | None,
) -> tuple[Float[Array, "B L H"], Complex[Array, "B H N"]]:
    """Same contract as ``reference.lti_ssm``."""
    if u.shape[1] == 1:
        moved = jnp.exp(log_A) * initial_state + B * u[:, 0, :, None]
        state = _unless_padding(moved, initial_state, segment_ids)
        return _product("bhn,hn->bh", state, C).real[:, None], state
    chunk = _chunk_size(u.shape[1])
    system = tables.diagonal(log_A, B, C, chunk)
    y, state = _chunked(u, system, tables.to_pairs(initial_state), segment_ids, chunk)
    return y, tables.from_pairs(state)


def lti_ssm_dense(
    u: Float[Array, "B L H"],
    A: Float[Array, "H S S"],
    B: Float[Array, "H S"],
    C: Float[Array, "H S"],
    initial_state: Float[Array, "B H S"],
    segment_ids: Int[Array, "B L"] | None,
) -> tuple[Float[Array, "B L H"], Float[Array, "B H S"]]:
    """Same contract as ``reference.lti_ssm_dense``."""
    if u.shape[1] == 1:
        moved = _product("hst,bht->bhs", A, initial_state) + B * u[:, 0, :, None]
        state = _unless_padding(moved, initial_state, segment_ids)
        return _product("bhs,hs->bh", state, C)[:, None], state
    chunk = _chunk_size(u.shape[1])
    y, state = _chunked(u, tables.dense(A, B, C, chunk), initial_state.swapaxes(0, 1), segment_ids, chunk)
    return y, state.swapaxes(0, 1)


def _unless_padding(moved, state, segment_ids):
    """A single token belongs to the incoming state, or is padding and leaves it alone."""
    return moved if segment_ids is None else jnp.where(segment_ids[..., None] != 0, moved, state)


def _chunk_size(length: int) -> int:
    """A power of two, no longer than needed."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def _chunked(u, system: tables.Tables, state, segment_ids, chunk: int):
    """y [B, L, H] and the final state [H, B, S], from u [B, L, H] (zero at padding) and state [H, B, S]."""
    if segment_ids is None:
        return _contiguous(u, system, state, None, jnp.full(u.shape[:1], u.shape[1], jnp.int32), chunk)
    places = compact(segment_ids)
    u = permute(u, places.order, places.place)
    y, state = _contiguous(u, system, state, places.start, places.n_real, chunk)
    return permute(y, places.place, places.order), state


def _contiguous(u, system: tables.Tables, state, start, n_real, chunk: int):
    """The same with padding only behind the ``n_real`` [B] first tokens; ``start`` [B, L] as in Compact."""
    batch, length, heads = u.shape
    padding = -length % chunk
    chunks = jnp.pad(u, [(0, 0), (0, padding), (0, 0)]).reshape(batch, -1, chunk, heads).transpose(3, 0, 1, 2)
    start_of = None
    if start is not None:
        start_of = jnp.pad(start, [(0, 0), (0, padding)], mode="edge").reshape(batch, -1, chunk)
    starts, final = _across(chunks, system, state, start_of)
    y = _within(chunks, system.kernel, start_of) + _seen(starts, system, start_of)
    if padding or start is not None:
        states = jnp.concatenate([starts, final[None]])
        final = _state_after(u, system, states, start, n_real, chunk)
    return y.transpose(1, 2, 3, 0).reshape(batch, -1, heads)[:, :length], final


def _across(u, system: tables.Tables, state, start):
    """States before the chunks [L / Q, H, B, S] and after the last, from u [H, B, L / Q, Q]."""
    continues = None
    if start is not None:
        u = jnp.where(start == start[..., -1:], u, 0)
        continues = (start[..., -1] < _chunk_index(start)).T
    written = jnp.moveaxis(_product("hbcq,hqs->hbcs", u, system.write), 2, 0)

    def step(state, xs):
        written, continues = xs
        moved = system.through(state)
        if continues is not None:
            moved = jnp.where(continues[:, None], moved, 0)
        return moved + written, state

    final, starts = jax.lax.scan(step, state, (written, continues))
    return starts, final


def _chunk_index(start: Int[Array, "B C Q"]) -> Int[Array, " C"]:
    """Place of the first token of every chunk."""
    return jnp.arange(start.shape[1], dtype=start.dtype) * start.shape[2]


def _seen(starts, system: tables.Tables, start):
    """What tokens see of the state before their chunk, [H, B, L / Q, Q]."""
    y = _product("hbcs,hqs->hbcq", jnp.moveaxis(starts, 0, 2), system.read)
    return y if start is None else jnp.where(start < _chunk_index(start)[:, None], y, 0)


def _within(u, kernel, start):
    """What tokens see of their own chunk, [H, B, L / Q, Q]."""
    heads, chunk = kernel.shape
    toeplitz = _toeplitz(kernel)
    if start is None:
        return _product("hbcj,hji->hbci", u, toeplitz)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def row(tokens):
        u, start = tokens
        return _within_segments(u, start, toeplitz)

    # Row by row, because it stays in cache, and because a loop reads a transposed copy of u where XLA would
    # transpose u anew for each level.
    return jnp.moveaxis(jax.lax.map(row, (jnp.moveaxis(u, 1, 0), start)), 0, 1)


def _within_segments(u, start, toeplitz):
    """What tokens of one row see of their own chunk and segment, [H, L / Q, Q]."""
    place = jnp.arange(start.size, dtype=start.dtype).reshape(start.shape)
    y = u * toeplitz[:, :1, :1]
    half = 1
    while half < start.shape[1]:
        # Neighbours of ``half`` tokens each; what continues over their boundary is the segment of the first
        # token behind it.
        pairs, starts, places = (t.reshape(*t.shape[:-2], -1, 2, half) for t in (u, start, place))
        source = jnp.where(places[:, 0] >= starts[:, 1, :1], pairs[..., 0, :], 0)
        seen = _product("hpj,hji->hpi", source, toeplitz[:, :half, half : 2 * half])
        seen = jnp.where(starts[:, 1] < places[:, 1, :1], seen, 0)
        y += jnp.stack([jnp.zeros_like(seen), seen], axis=-2).reshape(y.shape)
        half *= 2
    return y


def _toeplitz(kernel: Float[Array, "H Q"]) -> Float[Array, "H Q Q"]:
    """K_{i-j} at [j, i], zero for i < j; by a skewed reshape, whose gradient is no scatter."""
    heads, chunk = kernel.shape
    rows = jnp.broadcast_to(jnp.pad(kernel, [(0, 0), (0, chunk)])[:, None], (heads, chunk, 2 * chunk))
    skewed = rows.reshape(heads, -1)[:, :-chunk].reshape(heads, chunk, 2 * chunk - 1)
    return skewed[..., :chunk]


def _state_after(u, system: tables.Tables, states, start, n_real, chunk: int):
    """State [H, B, S] after the first ``n_real`` [B] tokens, from ``states`` before and after each chunk."""
    state = jnp.take_along_axis(states, (n_real // chunk)[None, None, :, None], axis=0)[0]
    tail, continues = last_tokens(u, start, n_real, chunk)
    if continues is not None:
        state = jnp.where(continues[:, None], state, 0)
    return system.advance(state, n_real % chunk) + _product("blh,hls->hbs", tail, system.write)


def last_tokens(
    u: Float[Array, "B L H"], start: Int[Array, "B L"] | None, n_real: Int[Array, " B"], chunk: int
) -> tuple[Float[Array, "B Q H"], Bool[Array, " B"] | None]:
    """Those behind the last whole chunk of ``n_real`` tokens and of the last segment, at the end of Q places
    with zeros before; and whether that segment began before them (None: it did)."""
    whole = (n_real // chunk * chunk)[:, None]
    place = n_real[:, None] - chunk + jnp.arange(chunk, dtype=n_real.dtype)
    own, continues = place >= whole, None
    if start is not None:
        begin = jnp.take_along_axis(start, jnp.maximum(n_real - 1, 0)[:, None], axis=1)
        own &= place >= begin
        continues = (begin < whole)[:, 0]
    tokens = jnp.take_along_axis(u, jnp.maximum(place, 0)[..., None], axis=1)
    return jnp.where(own[..., None], tokens, 0), continues

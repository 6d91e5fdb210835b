"""What the forward and the backward of the linear recurrence on TPU share: tables and the scan over chunks.

Complex numbers stand in lanes, all real parts before all imaginary ones, so that the tables' real products
need no rearrangement. A table of Q powers is a product of two of eight tokens and Q/8 tiles:

    write[j] = A^(Q-1-j) B = A^(7-r) B A^(8(Q/8-1-m)),   read[i] = conj(C A^(i+1)),   j, i = 8m + r.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lti_ssm.tpu_plan import Factors, Plan
from pallas_kernels.mosaic import SUBLANES


class Number(NamedTuple):
    """A complex number [1 or rows, S] as a factor: its real and imaginary parts in both halves of the lanes,
    the imaginary ones negative in the first half."""

    re: jax.Array
    im: jax.Array


def _first_half(z: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) < z.shape[-1] // 2


def repeat(start, stop, body: Callable[[jax.Array], None]) -> None:
    """``body(i)`` for ``start`` <= i < ``stop``, in order."""

    def step(i, nothing):
        body(i)
        return nothing

    jax.lax.fori_loop(start, stop, step, 0)


def swap(z: jax.Array) -> jax.Array:
    """Imaginary parts before real ones."""
    return pltpu.roll(z, z.shape[1] // 2, 1)


def number(z: jax.Array) -> Number:
    """``z`` [.., S] as a factor of :func:`multiply`."""
    swapped, first = swap(z), _first_half(z)
    return Number(jnp.where(first, z, swapped), jnp.where(first, -swapped, z))


def conj(a: Number) -> Number:
    """Its complex conjugate."""
    return Number(a.re, -a.im)


def multiply(z: jax.Array, a: Number) -> jax.Array:
    """Complex products, state by state."""
    return z * a.re + swap(z) * a.im


def conj_lanes(z: jax.Array) -> jax.Array:
    """The complex conjugates of ``z`` [.., S]."""
    return jnp.where(_first_half(z), z, -z)


def _row(a: Number, i: int) -> Number:
    return Number(a.re[i : i + 1], a.im[i : i + 1])


def write_tables(plan: Plan, kernel, factors, toeplitz_ref, write_ref, read_ref) -> None:
    """Of one channel: K_{i-j} at [j, i], write, read. ``kernel``: K [1, Q]; ``factors``: as Factors says."""
    Q, at = plan.chunk, Factors.of(plan.tiles)
    rows = pltpu.roll(jnp.broadcast_to(kernel, (Q, Q)), 0, 1, stride=1, stride_axis=0)
    toeplitz_ref[...] = jnp.where(_causal(Q), rows, 0.0)
    write, read = factors[at.write], conj_lanes(factors[at.read])
    swapped_write, swapped_read = swap(write), swap(read)
    high = number(factors[at.high])
    for m in range(plan.tiles):
        tile = slice(m * SUBLANES, (m + 1) * SUBLANES)
        a, b = _row(high, plan.tiles - 1 - m), _row(high, m)
        write_ref[tile, :] = write * a.re + swapped_write * a.im
        read_ref[tile, :] = read * b.re - swapped_read * b.im


def table_gradients(plan: Plan, factors, d_toeplitz, d_write, d_read) -> tuple[jax.Array, list[jax.Array]]:
    """What :func:`write_tables` gains: d_kernel [1, Q], and the first three of ``Factors`` in order."""
    Q, at = plan.chunk, Factors.of(plan.tiles)
    d_write, d_read = d_write[...], conj_lanes(d_read[...])
    high = conj(number(factors[at.high]))
    write, read = (conj(number(factors[rows])) for rows in (at.write, at.read))
    gains = jnp.zeros((SUBLANES, Q))
    d_low_write = d_low_read = jnp.zeros((SUBLANES, plan.d_state))
    d_high: list[jax.Array] = []
    diagonals = jnp.where(_causal(Q), d_toeplitz[...], 0.0)
    for m in range(plan.tiles):
        tile = slice(m * SUBLANES, (m + 1) * SUBLANES)
        mirrored = slice(Q - (m + 1) * SUBLANES, Q - m * SUBLANES)
        gains += pltpu.roll(diagonals[tile], (Q - m * SUBLANES) % Q, 1)
        d_low_write += multiply(d_write[mirrored], _row(high, m))
        d_low_read += multiply(d_read[tile], _row(high, m))
        both = multiply(d_write[mirrored], write) + multiply(d_read[tile], read)
        d_high.append(jnp.sum(both, axis=0, keepdims=True))
    row = jax.lax.broadcasted_iota(jnp.int32, gains.shape, 0)
    for bit in (1, 2, 4):  # row r of a tile by r lanes
        gains = jnp.where(row & bit != 0, pltpu.roll(gains, (Q - bit) % Q, 1), gains)
    return jnp.sum(gains, axis=0, keepdims=True), [d_low_write, d_low_read, *d_high]


def _causal(Q: int) -> jax.Array:
    j, i = (jax.lax.broadcasted_iota(jnp.int32, (Q, Q), axis) for axis in (0, 1))
    return i >= j


def scan(plan: Plan, v: jax.Array, jumps: jax.Array, links: jax.Array | None, *, reverse: bool) -> jax.Array:
    """s_c = A^Q s_{c-1} + v_c over the chunks of a block [rows, S], or s_c = conj(A^Q) s_{c+1} + v_c.

    Nothing crosses a chunk with a reset. ``jumps``: A^(Q 2^k).
    """
    row = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
    before = None if links is None else links >> 1
    for k in range((plan.block_chunks - 1).bit_length()):
        shift = plan.batch << k
        by = plan.rows - shift if reverse else shift
        power = number(jumps[k : k + 1])
        moved = multiply(pltpu.roll(v, by, 0), conj(power) if reverse else power)
        inside = row < by if reverse else row >= by
        if before is not None:
            inside &= before == pltpu.roll(before, by, 0)
        v += jnp.where(inside, moved, 0.0)
    return v


class Masks(NamedTuple):
    """Of the tokens of a block of chunks [rows, Q]; None where there are no resets.

    Attributes:
        run: resets so far in the chunk. remembered: nothing resets behind it in the chunk.
    """

    run: jax.Array
    remembered: jax.Array

    @classmethod
    def of(cls, code: jax.Array) -> Masks:
        """From codes: twice the resets, and in the last bit whether it is remembered."""
        return cls(code >> 1, code & 1 == 1)


def only(mask: jax.Array | None, t: jax.Array) -> jax.Array:
    """``t`` where ``mask``, else 0; all of it without a mask."""
    return t if mask is None else jnp.where(mask, t, 0.0)


def pass_on(plan: Plan, state: jax.Array, factors, links_ref, *, reverse: bool) -> jax.Array:
    """A^Q (or its conjugate) times ``state`` [B, S], through the last chunk of a block; 0 if that resets."""
    power = number(factors[Factors.of(plan.tiles).through])
    moved = multiply(state, conj(power) if reverse else power)
    if links_ref is None:
        return moved
    return jnp.where(links_ref[plan.rows - plan.batch :, :] & 1 == 1, moved, 0.0)


def states(plan: Plan, written, start, jumps, factors, links_ref, buffer_ref, block) -> None:
    """The states before the chunks of a block into ``buffer_ref`` [rows + B, S], and that after the last."""
    B, rows = plan.batch, plan.rows
    buffer_ref[:B, :] = start
    buffer_ref[B:, :] = written
    links = None if links_ref is None else links_ref[...]
    s = scan(plan, buffer_ref[:rows, :], jumps, links, reverse=False)
    buffer_ref[:rows, :] = real_chunks(plan, s, block)
    last = buffer_ref[rows - B : rows, :]
    buffer_ref[rows:, :] += pass_on(plan, last, factors, links_ref, reverse=False)


def real_chunks(plan: Plan, s: jax.Array, block: Any) -> jax.Array:
    """Zeros before chunks that only fill up the last block: what grows could overflow there."""
    if plan.all_chunks == plan.chunks:
        return s
    row = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    return jnp.where(row < (plan.chunks + 1 - block * plan.block_chunks) * plan.batch, s, 0.0)


def stop_row(plan: Plan, stops_ref, b: jax.Array, block: Any) -> jax.Array:
    """In a block's buffer, the row of the state at which row b of the batch stops; perhaps outside."""
    return (stops_ref[b] - block * plan.block_chunks) * plan.batch + b

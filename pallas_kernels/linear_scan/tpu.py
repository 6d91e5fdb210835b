"""The linear scan on TPU: every array is read or written once, in the layout it has; with its own backward.

A block of tokens and channels is walked in tiles of eight tokens (``tpu_walk``, ``tpu_tile``); the state
between blocks waits in VMEM. Complex numbers are pairs of planes.

The backward walks the other way. With g_t what the loss gains from h_t and p_t = a_t g_t,

    p_t = a_t (dh_t + p_{t+1}),   db_t = g_t = dh_t + p_{t+1},   da_t = g_t h_{t-1}:

it reads the decays where they stand, and needs no shifted copy of them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Inexact

from pallas_kernels import mosaic, planes
from pallas_kernels.dispatch import unsuitable
from pallas_kernels.linear_scan import tpu_tile
from pallas_kernels.linear_scan.tpu_tile import Walk
from pallas_kernels.linear_scan.tpu_walk import Plan, Tile, block_sizes
from pallas_kernels.mosaic import SUBLANES
from pallas_kernels.planes import Planes


class Setup(NamedTuple):
    """What is static in a call."""

    reverse: bool
    interpret: mosaic.Interpret


def linear_scan(
    a: Inexact[Array, "B L D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B L D"],
    initial_state: Inexact[Array, "B D"],
    reverse: bool = False,
    *,
    interpret: mosaic.Interpret = False,
) -> tuple[Inexact[Array, "B L D"], Inexact[Array, "B D"]]:
    """Same contract as ``xla.linear_scan``, in float32 or complex64; one token is left to XLA."""
    return _scan(Setup(reverse, interpret), a, b, initial_state)


def unsupported(a: jax.Array, b: jax.Array, initial_state: jax.Array, reverse: bool) -> str | None:
    """Why the kernel does not take a call, or None."""
    return unsuitable({"a": a, "b": b, "initial_state": initial_state}, jnp.float32, jnp.complex64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(setup: Setup, a: jax.Array, b: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    if b.shape[1] == 1:
        h = (a if a.ndim == 1 else a[:, 0]) * state + b[:, 0]
        return h[:, None], h
    h = planes.join(_forward_call(setup, planes.split(a), planes.split(b), planes.split(state)))
    return h, h[:, 0 if setup.reverse else -1]


def _forward(setup, a, b, state):
    h, final = _scan(setup, a, b, state)
    return (h, final), (a, h, state)


def _backward(setup, residuals, cotangents):
    a, h, state = residuals
    dh, d_final = cotangents
    if h.shape[1] == 1:
        g = dh[:, 0] + d_final
        da = g * state
        return jnp.sum(da, axis=0) if a.ndim == 1 else da[:, None], g[:, None], g * a.reshape(-1, a.shape[-1])
    numbers = (planes.split(t) for t in (a, dh, h, state, d_final))
    db, da = (planes.join(p) for p in _backward_call(setup, *numbers))
    first = -1 if setup.reverse else 0
    if a.ndim == 1:
        return jnp.sum(da, axis=(0, 1)), db, a * db[:, first]
    return da, db, a[:, first] * db[:, first]


_scan.defvjp(_forward, _backward)


def _plan(walk: Walk, a: Planes, b: Planes, read_or_written: int, summed: bool = False) -> Plan:
    """``read_or_written``: arrays [B, L, D], those of decays among them.

    Walking forward, what stands beyond the sequence is met last and never seen, unless it is summed.
    """
    constant = a[0].ndim == 1
    dtype = jnp.complex64 if len(b) == 2 else jnp.float32
    batch, length, channels = b[0].shape
    tokens, width = block_sizes(length, channels, dtype, read_or_written)
    masked = length % tokens != 0 and (walk.backward or summed)
    return Plan(walk, (batch, length, channels), tokens, width, constant, masked)


def _read(refs, rows) -> Planes:
    return tuple(ref[rows, :] for ref in refs)


def _write(refs, rows, values: Planes) -> None:
    for ref, value in zip(refs, values, strict=True):
        ref[rows, :] = value


def _rows_of_decay(plan: Plan, refs, rows) -> Planes:
    if not plan.constant:
        return _read(refs, rows)
    return tuple(jnp.broadcast_to(ref[...], (SUBLANES, plan.width)) for ref in refs)


def _only_tokens(plan: Plan, tile: Tile, a: Planes, *inputs: Planes) -> tuple[Planes, ...]:
    """Rows beyond the sequence let the carry pass: decays of one, inputs of zero."""
    if not plan.masked:
        return a, *inputs
    real = tile.position < plan.shape[1]
    one = (1.0, 0.0)[: len(a)]
    a = tuple(jnp.where(real, plane, fill) for plane, fill in zip(a, one))
    return a, *(planes.each(lambda plane: jnp.where(real, plane, 0.0), t) for t in inputs)


def _start(carry_refs, start_refs) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        for carry, start in zip(carry_refs, start_refs, strict=True):
            carry[...] = start[...]


def _forward_kernel(*refs, plan: Plan, count: int):
    a_refs, b_refs, state_refs, h_refs, carry_refs = (refs[i : i + count] for i in range(0, 5 * count, count))
    _start(carry_refs, state_refs)
    # Decays that are the same in every tile are combined once a block.
    fixed = plan.constant and not plan.masked
    once = tpu_tile.decays(_rows_of_decay(plan, a_refs, None), plan.walk) if fixed else None

    def body(tile, carry):
        b = _read(b_refs, tile.rows)
        if once is None:
            a, b = _only_tokens(plan, tile, _rows_of_decay(plan, a_refs, tile.rows), b)
            h = tpu_tile.scan(tpu_tile.decays(a, plan.walk), b, carry, plan.walk)
        else:
            h = tpu_tile.scan(once, b, carry, plan.walk)
        _write(h_refs, tile.rows, h)
        return tpu_tile.last_row(h, plan.walk)

    _write(carry_refs, slice(None), plan.walk_block(body, _read(carry_refs, slice(None))))


def _forward_call(setup: Setup, a: Planes, b: Planes, state: Planes) -> Planes:
    count, shape = len(b), b[0].shape
    constant = a[0].ndim == 1
    plan = _plan(Walk(setup.reverse), a, b, 2 if constant else 3)
    call = mosaic.tpu_call(
        functools.partial(_forward_kernel, plan=plan, count=count),
        name="linear_scan",
        grid=plan.grid,
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[plan.decays()] * count + [plan.tokens()] * count + [plan.state()] * count,
        out_specs=[plan.tokens()] * count,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)] * count,
        scratch_shapes=[pltpu.VMEM((1, plan.width), jnp.float32)] * count,
        interpret=setup.interpret,
    )
    a = planes.each(lambda t: t[None], a) if constant else a
    return tuple(call(*a, *b, *planes.each(lambda t: t[:, None], state)))


def _backward_kernel(*refs, plan: Plan, count: int):
    parts = iter(refs[i : i + count] for i in range(0, len(refs), count))
    a_refs, dh_refs, h_refs, around_refs, state_refs, d_final_refs, db_refs, da_refs, carry_refs = parts
    _start(carry_refs, d_final_refs)
    forward = Walk(not plan.walk.backward)
    fixed = plan.constant and not plan.masked
    once = tpu_tile.decays(_rows_of_decay(plan, a_refs, None), plan.walk) if fixed else None
    if plan.constant:
        _start(da_refs, [jnp.zeros_like(ref) for ref in da_refs])

    def body(tile, carry):
        a, dh = _rows_of_decay(plan, a_refs, tile.rows), _read(dh_refs, tile.rows)
        h_before = _h_before(plan, forward, tile, h_refs, around_refs, state_refs)
        a, dh, h_before = _only_tokens(plan, tile, a, dh, h_before)
        over = tpu_tile.decays(a, plan.walk) if once is None else once
        p = tpu_tile.scan(over, planes.multiply(a, dh), carry, plan.walk)
        from_later = tuple(plan.walk.before(plane, 1, edge) for plane, edge in zip(p, carry))
        g = planes.add(dh, from_later)
        _write(db_refs, tile.rows, g)
        da = planes.multiply(g, h_before)
        if plan.constant:
            for ref, plane in zip(da_refs, da):
                ref[...] += plane
        else:
            _write(da_refs, tile.rows, da)
        return tpu_tile.last_row(p, plan.walk)

    _write(carry_refs, slice(None), plan.walk_block(body, _read(carry_refs, slice(None))))


def _h_before(plan: Plan, forward: Walk, tile: Tile, h_refs, around_refs, state_refs) -> Planes:
    """h of the token before each of a tile's (in the scan's own order); the state before the first."""
    first_token = plan.shape[1] - 1 if forward.backward else 0
    inner, edge = (SUBLANES, plan.rows) if forward.backward else (-1, 0)
    row = tile.row + inner  # in this block, of the neighbour that is not in the tile
    outside = row == plan.rows if forward.backward else row < 0
    row = jnp.clip(row, 0, plan.rows - 1)

    def plane(h_ref, around_ref, state_ref):
        neighbour = jnp.where(outside, around_ref[forward.last], h_ref[pl.ds(row, 1), :])
        before = forward.before(h_ref[tile.rows, :], 1, neighbour)
        return jnp.where(tile.position == first_token, state_ref[...], before)

    return tuple(plane(*refs) for refs in zip(h_refs, around_refs, state_refs, strict=True))


def _backward_call(
    setup: Setup, a: Planes, dh: Planes, h: Planes, state: Planes, d_final: Planes
) -> tuple[Planes, Planes]:
    """db [B, L, D], and da like it or, for constant decays, as sums [B, 8, D]."""
    count, shape = len(h), h[0].shape
    constant = a[0].ndim == 1
    plan = _plan(Walk(not setup.reverse), a, h, 3 if constant else 5, summed=constant)
    sums = pl.BlockSpec((None, SUBLANES, plan.width), lambda b, d, t: (b, 0, d))
    sums_shape = (shape[0], SUBLANES, shape[2])
    in_specs = [plan.decays(), plan.tokens(), plan.tokens(), plan.tokens_around(setup.reverse)]
    call = mosaic.tpu_call(
        functools.partial(_backward_kernel, plan=plan, count=count),
        name="linear_scan_backward",
        grid=plan.grid,
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[spec for spec in (*in_specs, plan.state(), plan.state()) for _ in range(count)],
        out_specs=[plan.tokens()] * count + [sums if constant else plan.tokens()] * count,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)] * count
        + [jax.ShapeDtypeStruct(sums_shape if constant else shape, jnp.float32)] * count,
        scratch_shapes=[pltpu.VMEM((1, plan.width), jnp.float32)] * count,
        interpret=setup.interpret,
    )
    a = planes.each(lambda t: t[None], a) if constant else a
    state, d_final = (planes.each(lambda t: t[:, None], t) for t in (state, d_final))
    out = call(*a, *dh, *h, *h, *state, *d_final)
    return tuple(out[:count]), tuple(out[count:])

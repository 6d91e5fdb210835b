"""The backward of the linear recurrence on TPU: blocks of time from the last to the first.

States within a block are computed again from that before it. With dX_c what the loss gains from the state
behind chunk c and D_c from that before it,

    D_c = sum_i read_i dy_i + conj(A^Q) dX_c,   dX_{c-1} = D_c,   du_j = sum_i K_{i-j} dy_i + write_j . dX_c,

and the tables gain the sums over chunks of (token, token) and (token, state) products, the transition that
of conj(S_c) dX_c. From these the factors of the tables gain in the last step of a channel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic
from pallas_kernels.lti_ssm.tpu_plan import VMEM_LIMIT_BYTES, Plan, Resets
from pallas_kernels.lti_ssm.tpu_tile import (
    Masks,
    conj,
    multiply,
    number,
    only,
    pass_on,
    repeat,
    scan,
    states,
    stop_row,
    table_gradients,
    write_tables,
)
from pallas_kernels.mosaic import dot

TABLES = ("toeplitz", "write", "read")
GAINS = ("d_toeplitz", "d_write", "d_read", "d_through")
SCRATCH = ("carry", "buffer", "d_buffer", *TABLES, *GAINS)


def _kernel(stops_ref, most_ref, *refs, plan: Plan, inputs: tuple[str, ...], outputs: tuple[str, ...]):
    ref = dict(zip((*inputs, *outputs, *SCRATCH), refs, strict=True))

    step = pl.program_id(1)
    block = plan.time_blocks - 1 - step
    most = most_ref[block]

    def channel(h):
        @pl.when(step == 0)
        def _():
            _start(plan, h, stops_ref, ref)

        _channel(plan, h, stops_ref, most, block, ref)

        @pl.when(step == plan.time_blocks - 1)
        def _():
            _finish(plan, h, ref)

    repeat(0, plan.block, channel)


def _start(plan: Plan, h, stops_ref, ref) -> None:
    write_tables(plan, ref["kernel"][h], ref["factors"][h], *(ref[name].at[h] for name in TABLES))
    for name in GAINS:
        ref[name][h] = jnp.zeros(ref[name].shape[1:])
    if plan.tail:
        down, tail = ref["d_own"][h], ref["tail"][h]
        ref["d_tail"][h] = dot(down, ref["write"][h], (1, 1))
        ref["d_write"][h] = dot(tail, down, (0, 0))

    def one(b):  # rows that stop behind the last chunk
        stops = stops_ref[b] == plan.all_chunks
        ref["carry"][h, pl.ds(b, 1), :] = jnp.where(stops, ref["d_stopped"][h, pl.ds(b, 1), :], 0.0)

    repeat(0, plan.batch, one)


def _channel(plan: Plan, h, stops_ref, most, block, ref) -> None:
    B, rows = plan.batch, plan.rows
    links_ref, first, remembered = ref.get("links"), None, None
    if plan.packed:
        masks = Masks.of(ref["code"][...])
        first, remembered = masks.run == 0, masks.remembered
    u, dy, jumps, factors = (ref[name][h] for name in ("u", "dy", "jumps", "factors"))
    toeplitz, write, read = (ref[name][h] for name in TABLES)
    buffer, d_buffer, carry = ref["buffer"], ref["d_buffer"], ref["carry"].at[h]

    written = dot(only(remembered, u), write, (1, 0))
    states(plan, written, ref["starts"][h], jumps, factors, links_ref, buffer, block)
    S = buffer[:rows, :]

    dy_first = only(first, dy)
    d_buffer[:rows, :] = dot(dy_first, read, (1, 0))
    d_buffer[rows:, :] = carry[...]
    _add_stops(plan, stops_ref, ref["d_stopped"].at[h], d_buffer, block)
    d_buffer[rows - B : rows, :] += pass_on(plan, carry[...], factors, links_ref, reverse=True)
    links = None if links_ref is None else links_ref[...]
    d_buffer[:rows, :] = scan(plan, d_buffer[:rows, :], jumps, links, reverse=True)
    carry[...] = d_buffer[:B, :]
    dX = d_buffer[B:, :]

    ref["du"][h] = only(first, dot(dy_first, toeplitz, (1, 1))) + only(remembered, dot(dX, write, (1, 1)))
    ref["d_toeplitz"][h] += dot(only(first, u), dy_first, (0, 0))
    ref["d_write"][h] += dot(only(remembered, u), dX, (0, 0))
    ref["d_read"][h] += dot(dy_first, S, (0, 0))
    through = multiply(dX, conj(number(S)))
    if links_ref is not None:
        through = jnp.where(links_ref[...] & 1 == 1, through, 0.0)
    ref["d_through"][h] += jnp.sum(through, axis=0, keepdims=True)
    if plan.packed:
        _later_runs(h, most, ref)


def _add_stops(plan: Plan, stops_ref, d_stopped_ref, d_buffer_ref, block) -> None:
    def one(b):
        row = stop_row(plan, stops_ref, b, block)

        @pl.when((row >= 0) & (row < plan.rows))
        def _():
            d_buffer_ref[pl.ds(row, 1), :] += d_stopped_ref[pl.ds(b, 1), :]

    repeat(0, plan.batch, one)


def _later_runs(h, most, ref) -> None:
    def run(r):
        own = (ref["code"][...] >> 1) == r
        u, dy = (jnp.where(own, ref[name][h], 0.0) for name in ("u", "dy"))
        ref["du"][h] += jnp.where(own, dot(dy, ref["toeplitz"][h], (1, 1)), 0.0)
        ref["d_toeplitz"][h] += dot(u, dy, (0, 0))

    repeat(1, most + 1, run)


def _finish(plan: Plan, h, ref) -> None:
    ref["d_state"][h] = ref["carry"][h]
    gains = (ref[name].at[h] for name in GAINS[:3])
    ref["d_kernel"][h], rows = table_gradients(plan, ref["factors"][h], *gains)
    start = 0
    for part in (*rows, ref["d_through"][h]):
        ref["d_factors"][h, start : start + part.shape[0], :] = part
        start += part.shape[0]


def backward(plan: Plan, arrays: dict[str, jax.Array], stops: jax.Array, resets: Resets | None):
    """Gradients by name: du, d_kernel, d_factors, d_state, and with a tail d_tail.

    Args:
        arrays: those of ``forward`` but the state, its ``starts``, and the cotangents dy, d_stopped and with
            a tail d_own.
    """
    specs = plan.specs(backward=True)
    kinds = {"u": "tokens", "dy": "tokens", "kernel": "kernel", "factors": "factors", "jumps": "jumps"}
    kinds |= {"starts": "starts", "d_stopped": "state"}
    results = {"du": (arrays["u"], "tokens"), "d_kernel": (arrays["kernel"], "kernel")}
    results |= {"d_factors": (arrays["factors"], "factors"), "d_state": (arrays["d_stopped"], "state")}
    if plan.tail:
        kinds |= {"tail": "tail", "d_own": "state"}
        results["d_tail"] = (arrays["tail"], "tail")
    most = jnp.zeros(plan.time_blocks, jnp.int32)
    if resets is not None:
        arrays = arrays | {"code": resets.code, "links": resets.links}
        kinds |= {"code": "code", "links": "links"}
        most = resets.most
    Q, S, rows, f32 = plan.chunk, plan.d_state, plan.rows + plan.batch, jnp.float32
    tables = ((Q, Q), (Q, S), (Q, S))
    out = mosaic.tpu_call(
        functools.partial(_kernel, plan=plan, inputs=tuple(kinds), outputs=tuple(results)),
        name="lti_ssm_backward",
        grid=(plan.heads // plan.block, plan.time_blocks),
        semantics=("parallel", "arbitrary"),
        scalars=2,
        in_specs=[specs[kind] for kind in kinds.values()],
        out_specs=[specs[kind] for _, kind in results.values()],
        out_shape=[jax.ShapeDtypeStruct(like.shape, f32) for like, _ in results.values()],
        scratch_shapes=[
            pltpu.VMEM((plan.block, plan.batch, S), f32),
            *(pltpu.VMEM((rows, S), f32) for _ in range(2)),
            *(pltpu.VMEM((plan.block, *shape), f32) for shape in (*tables, *tables, (1, S))),
        ],
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
        interpret=plan.interpret,
    )(stops, most, *(arrays[name] for name in kinds))
    return dict(zip(results, out, strict=True))

"""The forward of the linear recurrence on TPU: ``lti_ssm/xla.py``'s equations, a channel at a time.

Tokens behind a reset see nothing before it. Within a chunk that is a product for each run of tokens between
resets, as many as the block's chunk with most of them has.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic
from pallas_kernels.lti_ssm.tpu_plan import VMEM_LIMIT_BYTES, Plan, Resets
from pallas_kernels.lti_ssm.tpu_tile import Masks, only, repeat, states, stop_row, write_tables
from pallas_kernels.mosaic import dot


def _kernel(stops_ref, most_ref, *refs, plan: Plan, inputs: tuple[str, ...], outputs: tuple[str, ...]):
    names = (*inputs, *outputs, "carry", "buffer", "toeplitz", "write", "read")
    ref = dict(zip(names, refs, strict=True))
    block = pl.program_id(1)
    most = most_ref[block]

    @pl.when(block == 0)
    def _():
        ref["carry"][...] = ref["state"][...]

    def channel(h):
        @pl.when(block == 0)
        def _():
            tables = (ref[name].at[h] for name in ("toeplitz", "write", "read"))
            write_tables(plan, ref["kernel"][h], ref["factors"][h], *tables)
            if plan.tail:
                ref["own"][h] = dot(ref["tail"][h], ref["write"][h], (1, 0))

        _channel(plan, h, most, block, ref)
        _keep_stops(plan, stops_ref, ref["stopped"].at[h], ref["buffer"], block)

    repeat(0, plan.block, channel)


def _channel(plan: Plan, h, most, block, ref) -> None:
    links_ref, masks = ref.get("links"), None
    if plan.packed:
        masks = Masks.of(ref["code"][...])
    u, start = ref["u"][h], ref["carry"][h]
    if "starts" in ref:
        ref["starts"][h] = start
    remembered = None if masks is None else masks.remembered
    written = dot(only(remembered, u), ref["write"][h], (1, 0))
    states(plan, written, start, ref["jumps"][h], ref["factors"][h], links_ref, ref["buffer"], block)
    ref["carry"][h] = ref["buffer"][plan.rows :, :]
    toeplitz = ref["toeplitz"].at[h]
    first = None if masks is None else masks.run == 0
    y = dot(only(first, u), toeplitz[...], (1, 0)) + dot(
        ref["buffer"][: plan.rows, :], ref["read"][h], (1, 1)
    )
    ref["y"][h] = only(first, y)
    if masks is None:
        return

    def later_run(r):
        own = (ref["code"][...] >> 1) == r
        seen = dot(jnp.where(own, ref["u"][h], 0.0), toeplitz[...], (1, 0))
        ref["y"][h] += jnp.where(own, seen, 0.0)

    repeat(1, most + 1, later_run)


def _keep_stops(plan: Plan, stops_ref, stopped_ref, buffer_ref, block) -> None:
    """Write the state of each row of the batch that stops in or just behind this block."""

    def one(b):
        row = stop_row(plan, stops_ref, b, block)

        @pl.when((row >= 0) & (row < plan.rows + plan.batch))
        def _():
            stopped_ref[pl.ds(b, 1), :] = buffer_ref[pl.ds(row, 1), :]

    repeat(0, plan.batch, one)


def forward(plan: Plan, arrays: dict[str, jax.Array], stops: jax.Array, resets: Resets | None, *, save: bool):
    """y, and the state of each row before chunk ``stops`` [B].

    Args:
        arrays: u [H, C*B, Q], kernel [H, 1, Q], factors and jumps (see ``tpu_tile``), state [H, B, S], and
            with ``plan.tail`` the last tokens of each row, tail [H, B, Q].

    Returns:
        Arrays by name: y, stopped, with a tail what it writes, own [H, B, S], and with ``save`` the states
        before each block of time, starts [H, T, B, S].
    """
    specs = plan.specs(backward=False)
    kinds = {"u": "tokens", "kernel": "kernel", "factors": "factors", "jumps": "jumps", "state": "state"}
    results = {"y": (arrays["u"].shape, "tokens"), "stopped": (arrays["state"].shape, "state")}
    if plan.tail:
        kinds["tail"] = "tail"
        results["own"] = (arrays["state"].shape, "state")
    if save:
        results["starts"] = ((plan.heads, plan.time_blocks, plan.batch, plan.d_state), "starts")
    most = jnp.zeros(plan.time_blocks, jnp.int32)
    if resets is not None:
        arrays = arrays | {"code": resets.code, "links": resets.links}
        kinds |= {"code": "code", "links": "links"}
        most = resets.most
    Q, S, f32 = plan.chunk, plan.d_state, jnp.float32
    out = mosaic.tpu_call(
        functools.partial(_kernel, plan=plan, inputs=tuple(kinds), outputs=tuple(results)),
        name="lti_ssm_forward",
        grid=(plan.heads // plan.block, plan.time_blocks),
        semantics=("parallel", "arbitrary"),
        scalars=2,
        in_specs=[specs[kind] for kind in kinds.values()],
        out_specs=[specs[kind] for _, kind in results.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, f32) for shape, _ in results.values()],
        scratch_shapes=[
            pltpu.VMEM((plan.block, plan.batch, S), f32),
            pltpu.VMEM((plan.rows + plan.batch, S), f32),
            *(pltpu.VMEM((plan.block, Q, width), f32) for width in (Q, S, S)),
        ],
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
        interpret=plan.interpret,
    )(stops, most, *(arrays[name] for name in kinds))
    return dict(zip(results, out, strict=True))

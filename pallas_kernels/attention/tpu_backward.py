"""Flash attention on TPU, backward: one kernel for dq, one for dk and dv; probabilities are computed again.

With P = exp(S - lse), dS = P (dP - delta), where ``delta`` is the row sum of d_out * out minus the cotangent
of the log-sum-exp. Each program owns what it sums, so two runs are equal to the bit.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.tpu_tile import (
    Axis,
    Call,
    Operands,
    Span,
    as_column,
    columns_of,
    logits,
    query_walk,
    scores,
    split_refs,
    within,
)
from pallas_kernels.mosaic import LANES, dot, quotient, remainder, tpu_call


def query_gradient(call: Call, span: Span, given: Operands) -> Float[Array, "B H Lq E"]:
    """dq in float32: a block of queries walks over keys, as in the forward."""
    specs = given.specs(call, *query_walk(given))
    wide = pltpu.VMEM((call.rows, LANES), jnp.float32)
    (dq,) = tpu_call(
        functools.partial(_query_kernel, call, jax.tree.structure(given)),
        name="attention_backward_q",
        grid=(*given.q.shape[:2], call.blocks[0], call.key_steps),
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        scalars=2,
        in_specs=jax.tree.leaves(specs),
        out_specs=[specs.q],
        out_shape=[jax.ShapeDtypeStruct(given.q.shape, jnp.float32)],
        scratch_shapes=[wide, wide, *columns_of(given.q_rows, call.rows)],
        interpret=call.interpret,
    )(*span, *jax.tree.leaves(given))
    return dq


def _query_kernel(call: Call, places, low, high, *refs):
    own, (dq, lse, delta, *columns) = split_refs(places, refs)
    b, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
    block, needed = within((low, high), b, i, j)

    @pl.when(j == 0)
    def start():
        dq[...] = jnp.zeros_like(dq)
        rows = (own.lse, own.delta, *jax.tree.leaves(own.q_rows))
        for column, row in zip((lse, delta, *columns), rows):
            column[...] = as_column(row[...])

    @pl.when(needed)
    def add():
        q = Axis.along_sublanes(own.q_rows, columns, i * call.rows, call.rows)
        kv = Axis.along_lanes(own.kv_rows, block * call.cols, call.cols)
        s = logits(call, scores(own.q[...], own.k[...]), q, kv, own.slopes)
        p = jnp.exp(s - lse[:, :1])
        ds = p * (scores(own.d_out[...], own.v[...]) - delta[:, :1]) * call.scale
        dq[...] += dot(ds.astype(own.k.dtype), own.k[...], (1, 0))


def key_gradients(
    call: Call, span: Span, given: Operands
) -> tuple[Float[Array, "B K Lk E"], Float[Array, "B K Lk E"]]:
    """dk and dv in float32: a block of keys walks over the queries of every head that reads it.

    Keys stand in sublanes and queries in lanes here, so that the statistics of queries are rows as stored.
    ``span``: the queries of every block of keys.
    """
    group, steps = given.q.shape[1] // given.k.shape[1], call.query_steps

    def queries(b, h, i, t, *span):
        return b, h * group + quotient(t, steps), within(span, b, i, remainder(t, steps))[0]

    def own(b, h, i, t, *_):
        return b, h, i

    specs = given.specs(call, queries, own)
    shape = jax.ShapeDtypeStruct(given.k.shape, jnp.float32)
    dk, dv = tpu_call(
        functools.partial(_key_kernel, call, jax.tree.structure(given)),
        name="attention_backward_kv",
        grid=(*given.k.shape[:2], call.blocks[1], group * steps),
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        scalars=2,
        in_specs=jax.tree.leaves(specs),
        out_specs=[specs.k, specs.v],
        out_shape=[shape, shape],
        scratch_shapes=columns_of(given.kv_rows, call.cols),
        interpret=call.interpret,
    )(*span, *jax.tree.leaves(given))
    return dk, dv


def _key_kernel(call: Call, places, low, high, *refs):
    own, (dk, dv, *columns) = split_refs(places, refs)
    b, i, t = (pl.program_id(axis) for axis in (0, 2, 3))
    block, needed = within((low, high), b, i, remainder(t, call.query_steps))

    @pl.when(t == 0)
    def start():
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)
        for column, row in zip(columns, jax.tree.leaves(own.kv_rows)):
            column[...] = as_column(row[...])

    @pl.when(needed)
    def add():
        q = Axis.along_lanes(own.q_rows, block * call.rows, call.rows)
        kv = Axis.along_sublanes(own.kv_rows, columns, i * call.cols, call.cols)
        s = logits(call, scores(own.k[...], own.q[...]), q, kv, own.slopes)
        p = jnp.exp(s - own.lse[...])
        ds = p * (scores(own.v[...], own.d_out[...]) - own.delta[...]) * call.scale
        dv[...] += dot(p.astype(own.d_out.dtype), own.d_out[...], (1, 0))
        dk[...] += dot(ds.astype(own.q.dtype), own.q[...], (1, 0))

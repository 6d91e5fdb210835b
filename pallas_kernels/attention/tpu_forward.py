"""Flash attention on TPU, forward: a block of queries walks over the blocks of keys it may see.

The online softmax (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135) with
queries in sublanes and keys in lanes. What masks know about queries is turned into columns once a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention.sources import MASKED
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
from pallas_kernels.mosaic import LANES, dot, tpu_call


def forward(
    call: Call, span: Span, given: Operands
) -> tuple[Float[Array, "B H Lq E"], Float[Array, "B H 1 Lq"]]:
    """Output in ``call.out_dtype`` and log-sum-exp in float32. ``span``: the keys of every query block."""
    batch, heads, length, width = given.q.shape
    specs = given.specs(call, *query_walk(given))
    wide = pltpu.VMEM((call.rows, LANES), jnp.float32)
    out, lse = tpu_call(
        functools.partial(_kernel, call, jax.tree.structure(given)),
        name="attention_forward",
        grid=(batch, heads, call.blocks[0], call.key_steps),
        semantics=("parallel", "parallel", "parallel", "arbitrary"),
        scalars=2,
        in_specs=jax.tree.leaves(specs),
        out_specs=[specs.q, pl.BlockSpec((None, None, 1, call.rows), lambda b, h, i, *_: (b, h, 0, i))],
        out_shape=[
            jax.ShapeDtypeStruct(given.q.shape, call.out_dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        scratch_shapes=[
            wide,
            wide,
            pltpu.VMEM((call.rows, width), jnp.float32),
            *columns_of(given.q_rows, call.rows),
        ],
        interpret=call.interpret,
    )(*span, *jax.tree.leaves(given))
    return out, lse


def _kernel(call: Call, places, low, high, *refs):
    own, (out, lse, top, total, values, *columns) = split_refs(places, refs)
    b, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
    block, needed = within((low, high), b, i, j)

    @pl.when(j == 0)
    def start():
        top[...] = jnp.full_like(top, MASKED)
        total[...], values[...] = jnp.zeros_like(total), jnp.zeros_like(values)
        for column, row in zip(columns, jax.tree.leaves(own.q_rows)):
            column[...] = as_column(row[...])

    @pl.when(needed)
    def add():
        q = Axis.along_sublanes(own.q_rows, columns, i * call.rows, call.rows)
        kv = Axis.along_lanes(own.kv_rows, block * call.cols, call.cols)
        s = logits(call, scores(own.q[...], own.k[...]), q, kv, own.slopes)
        before = top[:, :1]
        now = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
        p, kept = jnp.exp(s - now), jnp.exp(before - now)
        total[...] = kept * total[...] + jnp.sum(p, axis=1, keepdims=True)
        top[...] = jnp.broadcast_to(now, top.shape)
        values[...] = kept * values[...] + dot(p.astype(own.v.dtype), own.v[...], (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        some = total[...] > 0
        divisor = jnp.where(some, total[...], 1.0)
        out[...] = (values[...] / divisor[:, :1]).astype(out.dtype)
        lse[...] = jnp.where(some, top[...] + jnp.log(divisor), MASKED).T[:1]

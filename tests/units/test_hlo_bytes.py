"""Bytes that a compiled program moves, counted from its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from benchmarks import hlo_bytes
from pallas_kernels import mosaic

PROGRAM = """
%sliced (p0: f32[8,256], p1: s32[]) -> f32[1,256] {
  %p0 = f32[8,256]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %s = f32[1,256]{1,0:T(1,128)} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,256}
}
%updated (p0: f32[8,256], p1: f32[1,256], p2: s32[]) -> f32[8,256] {
  %p0.1 = f32[8,256]{1,0:T(8,128)} parameter(0)
  %p1.1 = f32[1,256]{1,0:T(1,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  ROOT %u = f32[8,256]{1,0:T(8,128)} dynamic-update-slice(%p0.1, %p1.1, %p2, %p2)
}
%condition (c: (s32[], f32[8,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %c = (s32[]{:T(128)}, f32[8,256]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}
%body (b: (s32[], f32[8,256])) -> (s32[], f32[8,256]) {
  %b = (s32[]{:T(128)S(2)}, f32[8,256]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(2)} get-tuple-element(%b), index=0
  %t = f32[8,256]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %row = f32[1,256]{1,0:T(1,128)} fusion(%t, %i), kind=kLoop, calls=%sliced
  %new = f32[8,256]{1,0:T(8,128)} fusion(%t, %row, %i), kind=kLoop, calls=%updated
  ROOT %r = (s32[]{:T(128)S(2)}, f32[8,256]{1,0:T(8,128)}) tuple(%i, %new)
}
ENTRY %main (a: bf16[100,100]) -> f32[8,256] {
  %a = bf16[100,100]{1,0:T(8,128)(2,1)} parameter(0)
  %near = bf16[100,100]{1,0:T(8,128)(2,1)S(1)} copy(%a)
  %far = bf16[100,100]{0,1:T(8,128)(2,1)} copy(%near), metadata={op_name="x"}
  %init = (s32[]{:T(128)S(2)}, f32[8,256]{1,0:T(8,128)}) tuple(%far, %a)
  %loop = (s32[]{:T(128)S(2)}, f32[8,256]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,256]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_buffers_slices_and_loops():
    rows = {row.name: row.bytes for row in hlo_bytes.count(jnp.sin, PROGRAM, 1.0)}
    tiled = 104 * 128 * 2  # 100 x 100 in tiles of 8 x 128
    # What is in fast memory is not counted; a loop's slices and updates are, 8 times.
    assert rows == {"near": tiled, "far": tiled, "row": 8 * 2 * 1024, "new": 8 * 2 * 1024}


def run(x, w):
    """Blocks of w are fetched once for each block of rows; x and y once."""

    def kernel(x_ref, w_ref, y_ref):
        y_ref[...] = x_ref[...] * w_ref[...]

    tile, f32 = (8, 128), jnp.float32
    (y,) = mosaic.tpu_call(
        kernel,
        name="scaled",
        grid=(4, 3),
        semantics=("parallel", "parallel"),
        in_specs=[pl.BlockSpec(tile, lambda i, j: (i, j)), pl.BlockSpec(tile, lambda i, j: (0, j))],
        out_specs=[pl.BlockSpec(tile, lambda i, j: (i, j))],
        out_shape=[jax.ShapeDtypeStruct((32, 384), f32)],
    )(x, w)
    return y


def test_a_pallas_call_counts_the_blocks_it_fetches():
    shape = jax.ShapeDtypeStruct
    args = shape((32, 384), jnp.float32), shape((8, 384), jnp.float32)
    (call,) = hlo_bytes.pallas_calls(jax.make_jaxpr(jax.jit(run))(*args).jaxpr)
    block = 8 * 128 * 4
    assert call == ("scaled", ((32, 384), (8, 384), (32, 384)), (12 * block, 12 * block, 12 * block))
    program = """
ENTRY %main (x: f32[32,384], w: f32[8,384]) -> f32[32,384] {
  %x = f32[32,384]{1,0:T(8,128)} parameter(0)
  %w = f32[8,384]{1,0:T(8,128)S(1)} parameter(1)
  ROOT %scaled.1 = f32[32,384]{1,0:T(8,128)} custom-call(%x, %w), custom_call_target="tpu_custom_call"
}
"""
    assert [row.bytes for row in hlo_bytes.count(run, program, *args)] == [24 * block]
    with pytest.raises(ValueError, match=r"Pallas call scaled.1 with buffers .* is not in the trace"):
        hlo_bytes.count(jnp.sin, program, 1.0)

"""SSD forward on a GPU: one block walks the chunks of a row, a head and 64 of its channels.

Not yet run on a GPU (see ``pallas_kernels/mosaic_gpu.py``). With alpha the cumulative sum of log decays in
the chunk, S the state at its start (float32, in registers) and S' at its end:

    y_i = sum_{j<=i} (C_i . B_j) e^(alpha_i - alpha_j) u_j + e^(alpha_i) S C_i
    S'  = e^(alpha_Q) S + sum_j e^(alpha_Q - alpha_j) u_j B_j^T
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu import (
    MATRIX,
    OF_ROWS,
    OPERAND,
    Tile,
    load,
    matmul,
    over_columns,
    publish,
    transposed,
)
from pallas_kernels.ssd.gpu_chunk import CHANNELS, CHUNK, Decays, within


def forward(u, B, C, decays: Decays, state, *, save_states: bool, interpret=None) -> list[jax.Array]:
    """y [B, L, H, P], the final state [B, H, P, N] and, if asked for, the state at the start of every chunk
    [B, L/Q, H, P, N] in the dtype of ``u``. L, P and N are multiples of 64."""
    batch, length, heads, headdim = u.shape
    d_state = B.shape[3]
    out_type = [jax.ShapeDtypeStruct(u.shape, u.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
    if save_states:
        starts = (batch, length // CHUNK, *state.shape[1:])
        out_type.append(jax.ShapeDtypeStruct(starts, u.dtype))
    operands = [u, B, C, state, *decays.arrays()]

    def body(u, B, C, state, *refs):
        count = len(operands) - 4
        y, final, *starts, start, weights, written = refs[count:]
        _kernel(u, B, C, state, Decays(*refs[:count]), y, final, starts, start, weights, written)

    return mosaic_gpu.gpu_call(
        body,
        name="ssd_forward",
        grid={"channels": headdim // CHANNELS, "head": heads, "row": batch},
        out_type=out_type,
        scratch=[
            mosaic_gpu.operand(CHANNELS, d_state, u.dtype),
            mosaic_gpu.operand(CHUNK, CHUNK, u.dtype),
            mosaic_gpu.operand(CHUNK, CHANNELS, u.dtype),
        ],
        interpret=interpret,
    )(*operands)


def _kernel(u, B, C, state, decays, y, final, starts, start, weights, written) -> None:
    row, head = mosaic_gpu.block("row"), mosaic_gpu.block("head")
    channels = pl.ds(mosaic_gpu.block("channels") * CHANNELS, CHANNELS)
    d_state = B.shape[3]
    group = lax.div(head, jnp.int32(u.shape[2] // B.shape[2]))

    def by_token(ref, place, columns, width) -> Tile:
        def index(c):
            return row, pl.ds(c * CHUNK, CHUNK), place, columns

        return Tile(ref, (CHUNK, width), index, OPERAND)

    def one_chunk(c, inputs, outputs, S):
        u_c, B_c, C_c, alpha, from_start, to_end, *runs = inputs
        S_c = outputs[1] if starts else start
        S_c[...] = S.astype(S_c.dtype)
        scores = matmul((C_c, transposed(B_c)))
        weights[...] = (scores * within(alpha, *runs)).astype(weights.dtype)
        u_f32 = load(u_c, MATRIX).astype(jnp.float32)
        written[...] = (u_f32 * over_columns(load(to_end, OF_ROWS), CHANNELS)).astype(written.dtype)
        publish()
        decay = over_columns(load(from_start, OF_ROWS), CHANNELS)
        y_c = matmul((weights, u_c)) + matmul((C_c, transposed(S_c))) * decay
        outputs[0][...] = y_c.astype(u.dtype)
        return S * from_start[CHUNK - 1] + matmul((transposed(written), B_c))

    whole = slice(None)
    inputs = [
        by_token(u, head, channels, CHANNELS),
        by_token(B, group, whole, d_state),
        by_token(C, group, whole, d_state),
        *decays.tiles(row, lambda c: (head, c)),
    ]
    outputs = [by_token(y, head, channels, CHANNELS)]
    for ref in starts:
        outputs.append(Tile(ref, (CHANNELS, d_state), lambda c: (row, c, head, channels, whole), OPERAND))
    S = mosaic_gpu.load_plain(state.at[row, head, channels], MATRIX)
    S = mosaic_gpu.walk(u.shape[1] // CHUNK, inputs, outputs, one_chunk, S)
    final[row, head, channels] = S

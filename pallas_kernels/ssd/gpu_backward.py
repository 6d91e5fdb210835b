"""SSD backward on a GPU: one kernel walks the chunks in reverse for the states, one takes every chunk alone.

Not yet run on a GPU (see ``pallas_kernels/mosaic_gpu.py``). Notation of ``gpu_forward.py``; d of a letter is
the loss's gradient with respect to it, W_ij = (C_i . B_j) e^(alpha_i - alpha_j) for j <= i, else 0:

    dS    = e^(alpha_Q) dS' + sum_i e^(alpha_i) dy_i C_i^T
    du_j  = sum_i W_ij dy_i + e^(alpha_Q - alpha_j) dS' B_j
    dC_i  = sum_j dG_ij B_j + e^(alpha_i) S^T dy_i            dG_ij = (dy_i . u_j) e^(alpha_i - alpha_j)
    dB_j  = sum_i dG_ij C_i + e^(alpha_Q - alpha_j) dS'^T u_j
    d alpha_i = <what y_i read, dy_i> - <u_i, du_i>,          and at the chunk's end + <dS', S'>.

Nothing is added by several blocks: each block of heads leaves its own part of dB and dC.
"""

from __future__ import annotations

from typing import NamedTuple

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
    Value,
    load,
    matmul,
    over_columns,
    publish,
    transposed,
)
from pallas_kernels.ssd.gpu_chunk import CHANNELS, CHUNK, Decays, within

WHOLE = slice(None)
BLOCKS = 264  # to keep an H100 (132 multiprocessors) busy


def state_gradients(dy, C, decays: Decays, starts, d_final, *, interpret=None) -> list[jax.Array]:
    """Of dy [B, L, H, P] and the saved states [B, L/Q, H, P, N]:

    dS' of every chunk, like the saved states; <dS, S> of every chunk by channel [B, L/Q, H, P] and the
    gradient of the initial state [B, H, P, N], both float32.
    """
    batch, _, heads, headdim = dy.shape
    overlap = jax.ShapeDtypeStruct(starts.shape[:4], jnp.float32)
    operands = [dy, C, starts, d_final, *decays.arrays()]

    def body(dy, C, starts, d_final, *refs):
        count = len(operands) - 4
        _walk_back(dy, C, starts, d_final, Decays(*refs[:count]), *refs[count:])

    return mosaic_gpu.gpu_call(
        body,
        name="ssd_state_gradients",
        grid={"channels": headdim // CHANNELS, "head": heads, "row": batch},
        out_type=[starts, overlap, d_final],
        scratch=[mosaic_gpu.operand(CHUNK, CHANNELS, dy.dtype)],
        interpret=interpret,
    )(*operands)


def _walk_back(dy, C, starts, d_final, decays, d_ends, overlap, d_initial, scaled) -> None:
    row, head = mosaic_gpu.block("row"), mosaic_gpu.block("head")
    channels = pl.ds(mosaic_gpu.block("channels") * CHANNELS, CHANNELS)
    chunks, d_state = starts.shape[1], C.shape[3]
    group = lax.div(head, jnp.int32(dy.shape[2] // C.shape[2]))

    def reverse(step):
        return chunks - 1 - step

    def tokens(step):
        return pl.ds(reverse(step) * CHUNK, CHUNK)

    def one_chunk(_, inputs, outputs, dS):
        dy_c, C_c, S_c, _, from_start, *_ = inputs
        outputs[0][...] = dS.astype(d_ends.dtype)
        decay = over_columns(load(from_start, OF_ROWS), CHANNELS)
        scaled[...] = (load(dy_c, MATRIX).astype(jnp.float32) * decay).astype(scaled.dtype)
        publish()
        dS = dS * from_start[CHUNK - 1] + matmul((transposed(scaled), C_c))
        outputs[1][...] = jnp.sum(dS * load(S_c, MATRIX).astype(jnp.float32), axis=1)
        return dS

    def state(ref) -> Tile:
        place = (CHANNELS, d_state)[: len(ref.shape) - 3]

        def index(step):
            return (row, reverse(step), head, channels, WHOLE)[: len(ref.shape)]

        return Tile(ref, place, index, OPERAND if len(place) == 2 else ())

    inputs = [
        Tile(dy, (CHUNK, CHANNELS), lambda step: (row, tokens(step), head, channels), OPERAND),
        Tile(C, (CHUNK, d_state), lambda step: (row, tokens(step), group, WHOLE), OPERAND),
        state(starts),
        *decays.tiles(row, lambda step: (head, reverse(step))),
    ]
    dS = mosaic_gpu.load_plain(d_final.at[row, head, channels], MATRIX)
    dS = mosaic_gpu.walk(chunks, inputs, [state(d_ends), state(overlap)], one_chunk, dS)
    d_initial[row, head, channels] = dS


def token_gradients(u, dy, B, C, decays: Decays, starts, d_ends, *, interpret=None) -> list[jax.Array]:
    """du like u; what d alpha is of y and u, [P/64, B, H, L]; dB and dC of each block of heads
    [B, blocks, G, L, N]; all but du float32."""
    batch, length, heads, headdim = u.shape
    groups, d_state = B.shape[2:]
    per_group = heads // groups
    alone = batch * groups * (length // CHUNK)
    split = next(
        n for n in range(1, per_group + 1) if per_group % n == 0 and (n == per_group or n * alone >= BLOCKS)
    )
    parts = jax.ShapeDtypeStruct((batch, split, groups, length, d_state), jnp.float32)
    d_alpha = jax.ShapeDtypeStruct((headdim // CHANNELS, batch, heads, length), jnp.float32)
    operands = [u, dy, B, C, starts, d_ends, *decays.arrays()]

    def body(u, dy, B, C, starts, d_ends, *refs):
        count = len(operands) - 6
        _each_head(u, dy, B, C, starts, d_ends, Decays(*refs[:count]), *refs[count:])

    square, tall = (mosaic_gpu.operand(CHUNK, n, u.dtype) for n in (CHUNK, CHANNELS))
    once = mosaic_gpu.operand(CHUNK, d_state, u.dtype)
    return mosaic_gpu.gpu_call(
        body,
        name="ssd_token_gradients",
        grid={"chunk": length // CHUNK, "heads": groups * split, "row": batch},
        out_type=[u, d_alpha, parts, parts],
        scratch=[square, square, tall, tall, once, once, mosaic_gpu.barrier(2)],
        interpret=interpret,
    )(*operands)


class Scratch(NamedTuple):
    """Shared memory of a block."""

    weights: Value  # [Q, Q]
    d_scores: Value  # [Q, Q]
    read: Value  # [Q, P] dy_i e^(alpha_i)
    written: Value  # [Q, P] u_j e^(alpha_Q - alpha_j)
    B: Value  # [Q, N] of this chunk and group
    C: Value
    ready: Value


def _each_head(u, dy, B, C, starts, d_ends, decays, du, d_alpha, dB, dC, *scratch) -> None:
    row, chunk = mosaic_gpu.block("row"), mosaic_gpu.block("chunk")
    (groups, d_state), split = B.shape[2:], dB.shape[1]
    group = lax.div(mosaic_gpu.block("heads"), jnp.int32(split))
    part = lax.rem(mosaic_gpu.block("heads"), jnp.int32(split))
    heads, tiles = u.shape[2] // (groups * split), u.shape[3] // CHANNELS
    first = (group * split + part) * heads
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    rooms = Scratch(*scratch)
    mosaic_gpu.fetch_now(
        [(B.at[row, tokens, group], rooms.B), (C.at[row, tokens, group], rooms.C)], rooms.ready
    )

    def head(step):
        return first + lax.div(step, jnp.int32(tiles))

    def tile(step):
        return lax.rem(step, jnp.int32(tiles))

    def channels(step):
        return pl.ds(tile(step) * CHANNELS, CHANNELS)

    def by_token(ref) -> Tile:
        return Tile(ref, (CHUNK, CHANNELS), lambda step: (row, tokens, head(step), channels(step)), OPERAND)

    def by_chunk(ref) -> Tile:
        return Tile(
            ref, (CHANNELS, d_state), lambda step: (row, chunk, head(step), channels(step), WHOLE), OPERAND
        )

    inputs = [by_token(u), by_token(dy), by_chunk(starts), by_chunk(d_ends)]
    inputs += decays.tiles(row, lambda step: (head(step), chunk))
    outputs = [by_token(du), Tile(d_alpha, (CHUNK,), lambda step: (tile(step), row, head(step), tokens))]
    zero = mosaic_gpu.full((CHUNK, d_state), 0.0, MATRIX)
    steps = heads * tiles
    sums = mosaic_gpu.walk(
        steps, inputs, outputs, lambda _, i, o, sums: _one_head(rooms, i, o, sums), (zero, zero)
    )
    for ref, total in zip((dB, dC), sums):
        ref[row, part, group, tokens] = total


def _one_head(rooms: Scratch, inputs, outputs, sums):
    """64 channels of a head, in one chunk; adds to dB and dC [Q, N]."""
    u, dy, S, d_end, alpha, from_start, to_end, *runs = inputs
    B, C, (dB, dC) = rooms.B, rooms.C, sums
    decay = within(alpha, *runs)
    weights = (matmul((C, transposed(B))) * decay).astype(u.dtype)
    d_weights = matmul((dy, transposed(u)))
    read = jnp.sum(d_weights * weights.astype(jnp.float32), axis=1)
    rooms.weights[...] = weights
    rooms.d_scores[...] = (d_weights * decay).astype(u.dtype)

    start, end = (over_columns(load(t, OF_ROWS), CHANNELS) for t in (from_start, to_end))
    u_f32, dy_f32 = (load(t, MATRIX).astype(jnp.float32) for t in (u, dy))
    rooms.read[...] = (dy_f32 * start).astype(u.dtype)
    rooms.written[...] = (u_f32 * end).astype(u.dtype)
    publish()

    du = matmul((transposed(rooms.weights), dy)) + matmul((B, transposed(d_end))) * end
    outputs[0][...] = du.astype(u.dtype)
    read = read + jnp.sum(matmul((C, transposed(S))) * start * dy_f32, axis=1)
    outputs[1][...] = read - jnp.sum(u_f32 * du, axis=1)
    dB = dB + matmul((transposed(rooms.d_scores), C), (rooms.written, d_end))
    dC = dC + matmul((rooms.d_scores, B), (rooms.read, S))
    return dB, dC

"""The bodies of the selective scan's GPU kernels; what they are given is prepared by ``gpu.py``.

Rows of 128 channels are what a thread has one element of. With a_t = exp(dt_t A), u_t = dt_t x_t:

    h_t = a_t h_{t-1} + u_t B_t,   y_t = h_t . C_t
    dh_t = dy_t C_t + a_{t+1} dh_{t+1},   d(dt_t A) = dh_t a_t h_{t-1},   du_t = dh_t . B_t
    dB_t = sum over channels of u_t dh_t,   dC_t = sum over channels of dy_t h_t
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu import MATRIX, THREADS, Tile, Value

TOKENS = 32  # of a tile of the forward
PRODUCTS = 128  # rows (token, n) of a tile of the backward: 64 KiB each for two arrays of them
Rows = tuple[Value, ...]  # one for each n: [128]


class Block:
    """What one block works on: one row of the batch, 128 channels."""

    def __init__(self, x, B, C):
        self.row, self.number = mosaic_gpu.block("row"), mosaic_gpu.block("channels")
        self.channels = pl.ds(self.number * THREADS, THREADS)
        self.blocks = x.shape[2] // THREADS
        self.length = x.shape[1]

    def by_token(self, ref, tokens: int, place) -> Tile:
        """A tile of x, dt or the like [B, L, E]."""

        def index(step):
            return self.row, pl.ds(place(step) * tokens, tokens), self.channels

        return Tile(ref, (tokens, THREADS), index)

    def by_group(self, ref, tokens: int, place) -> Tile:
        """A tile of B or C [B, L, G, N], or of keep [B, L, N]."""
        group = (lax.div(self.number, jnp.int32(self.blocks // ref.shape[2])),) if len(ref.shape) == 4 else ()

        def index(step):
            return self.row, pl.ds(place(step) * tokens, tokens), *group, slice(None)

        return Tile(ref, (tokens, ref.shape[-1]), index)

    def rows(self, ref, *place) -> Rows:
        """[.., N, E] at ``place``, from global memory."""
        return tuple(ref[(*place, n, self.channels)] for n in range(ref.shape[-2]))

    def write(self, ref, place: tuple, rows: Rows) -> None:
        """The reverse of :meth:`rows`."""
        for n, row in enumerate(rows):
            ref[(*place, n, self.channels)] = row


class Of(NamedTuple):
    """B or C, of every token or constant."""

    tile: Any  # reference to [tokens, N], or None
    constant: Rows | None

    def at(self, i) -> Sequence[Value]:
        """For each n a number, or a row of 128 channels."""
        return self.constant or [self.tile[i, n] for n in range(self.tile.shape[1])]


def _sources(block: Block, tokens: int, place, by_token: Sequence, keep, B, C) -> tuple[list[Tile], Any]:
    """Tiles of what is read, and how to find B and C among their references."""
    tiles = [block.by_token(ref, tokens, place) for ref in by_token] + [block.by_group(keep, tokens, place)]
    constants = [block.rows(ref) if len(ref.shape) == 2 else None for ref in (B, C)]
    tiles += [block.by_group(ref, tokens, place) for ref in (B, C) if len(ref.shape) == 4]

    def find(refs) -> tuple[Of, Of]:
        rest = iter(refs[len(by_token) + 1 :])
        first, second = (Of(None if rows else next(rest), rows) for rows in constants)
        return first, second

    return tiles, find


def advance(h: Rows, A: Rows, dt, u, keep, B: Sequence) -> Rows:
    """The states after a token."""
    return tuple(jnp.exp(dt * a) * keep * h_n + u * b for h_n, a, b in zip(h, A, B))


def total(terms) -> Value:
    """Their sum, without a zero to start from."""
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def forward(x, dt, A, B, C, state, keep, *, save_states: bool, interpret=None) -> list[jax.Array]:
    """y [B, L, E], the final state [B, N, E] and, if asked for, the states every 128 / N tokens
    [B, L N / 128, N, E]; all float32. ``keep`` [B, L, N] is 0 at a reset, else 1."""
    batch, length, channels = x.shape
    d_state = A.shape[0]
    save = PRODUCTS // d_state
    out_type = [jax.ShapeDtypeStruct(x.shape, jnp.float32), state]
    if save_states:
        out_type.append(jax.ShapeDtypeStruct((batch, length // save, d_state, channels), jnp.float32))

    def body(x, dt, A, B, C, state, keep, y, final, *starts):
        block = Block(x, B, C)
        A = block.rows(A)
        tiles, find = _sources(block, TOKENS, lambda step: step, [x, dt], keep, B, C)

        def walk_tile(step, inputs, outputs, h):
            x_tile, dt_tile, keep_tile, *_ = inputs
            B_tile, C_tile = find(inputs)

            def one_token(i, h: Rows) -> Rows:
                for ref in starts:
                    t = step * TOKENS + i

                    @mosaic_gpu.when(lax.rem(t, jnp.int32(save)) == 0)
                    def _():
                        block.write(ref, (block.row, lax.div(t, jnp.int32(save))), h)  # noqa: B023

                dt_t = dt_tile[i]
                u = dt_t * x_tile[i].astype(jnp.float32)
                h = advance(h, A, dt_t, u, keep_tile[i, 0], B_tile.at(i))
                outputs[0][i] = total(h_n * c for h_n, c in zip(h, C_tile.at(i)))
                return h

            return mosaic_gpu.repeat(TOKENS, one_token, h)

        outputs = [block.by_token(y, TOKENS, lambda step: step)]
        h = block.rows(state, block.row)
        h = mosaic_gpu.walk(length // TOKENS, tiles, outputs, walk_tile, h)
        block.write(final, (block.row,), h)

    return mosaic_gpu.gpu_call(
        body,
        name="selective_scan",
        grid={"channels": channels // THREADS, "row": batch},
        out_type=out_type,
        private_rows=True,
        interpret=interpret,
    )(x, dt, A, B, C, state, keep)


class Sums(NamedTuple):
    """Carried through the backward, from the last tile to the first."""

    dh: Rows
    dA: Rows
    dB: Rows  # of a constant B; else empty
    dC: Rows


def backward(x, dt, A, B, C, keep, starts, dy, d_final, *, interpret=None) -> list[jax.Array]:
    """dx like x; d dt [B, L, E]; dA [B, N, E]; of B and C: of every block of channels [B, blocks, L N], or
    [B, N, E] where constant; the gradient of the initial state [B, N, E]."""
    batch, length, channels = x.shape
    d_state = A.shape[0]
    tokens = PRODUCTS // d_state
    by_block = jax.ShapeDtypeStruct((batch, channels // THREADS, length * d_state), jnp.float32)
    of_B, of_C = (d_final if t.ndim == 2 else by_block for t in (B, C))

    def body(x, dt, A, B, C, keep, starts, dy, d_final, dx, d_dt, dA, dB, dC, d_state_out, before, read):
        block = Block(x, B, C)
        A = block.rows(A)
        tiles = length // tokens

        def place(step):
            return tiles - 1 - step

        sources, find = _sources(block, tokens, place, [x, dt, dy], keep, B, C)
        outputs = [block.by_token(ref, tokens, place) for ref in (dx, d_dt)]
        outputs += [_products(block, ref, place) for ref in (dB, dC) if ref.shape == by_block.shape]

        def walk_tile(step, inputs, outs, sums):
            h = block.rows(starts, block.row, place(step))
            _states_again(inputs, find(inputs), A, h, before, read)
            sums = _reverse(inputs, find(inputs), A, outs, sums, before)
            mosaic_gpu.publish()
            found = find(inputs)
            summed = [rows for rows, of in zip((before, read), found) if of.constant is None]
            for ref, rows in zip(outs[2:], summed):
                _sum_channels(rows, ref)
            return sums

        zeros = (mosaic_gpu.zero_row(THREADS),) * d_state
        constant = [zeros if len(ref.shape) == 2 else () for ref in (B, C)]
        sums = Sums(block.rows(d_final, block.row), zeros, *constant)
        sums = mosaic_gpu.walk(tiles, sources, outputs, walk_tile, sums)
        block.write(d_state_out, (block.row,), sums.dh)
        block.write(dA, (block.row,), sums.dA)
        for ref, rows in ((dB, sums.dB), (dC, sums.dC)):
            block.write(ref, (block.row,), rows)

    return mosaic_gpu.gpu_call(
        body,
        name="selective_scan_backward",
        grid={"channels": channels // THREADS, "row": batch},
        out_type=[x, dt, d_final, of_B, of_C, d_final],
        scratch=[mosaic_gpu.rows(PRODUCTS), mosaic_gpu.rows(PRODUCTS)],
        private_rows=True,  # but for the sums over channels, which publish
        interpret=interpret,
    )(x, dt, A, B, C, keep, starts, dy, d_final)


def _products(block: Block, ref, place) -> Tile:
    """128 sums over the channels of this block, of tokens and n."""
    return Tile(
        ref, (PRODUCTS,), lambda step: (block.row, block.number, pl.ds(place(step) * PRODUCTS, PRODUCTS))
    )


def _states_again(inputs, of, A: Rows, h: Rows, before, read) -> None:
    """Writes h_{t-1} and dy_t h_t, [token and n, 128]."""
    x, dt, dy, keep, *_ = inputs
    B, _ = of
    d_state = len(A)

    def one_token(i, h: Rows) -> Rows:
        for n in range(d_state):
            before[i * d_state + n] = h[n]
        h = advance(h, A, dt[i], dt[i] * x[i].astype(jnp.float32), keep[i, 0], B.at(i))
        for n in range(d_state):
            read[i * d_state + n] = dy[i] * h[n]
        return h

    mosaic_gpu.repeat(x.shape[0], one_token, h)


def _reverse(inputs, of, A: Rows, outputs, sums: Sums, before) -> Sums:
    """Writes dx and d dt, and u_t dh_t over ``before``."""
    x, dt, dy, keep, *_ = inputs
    B, C = of
    tokens, d_state = x.shape[0], len(A)

    def one_token(i, sums: Sums) -> Sums:
        i = tokens - 1 - i
        x_t, dt_t, dy_t = x[i].astype(jnp.float32), dt[i], dy[i]
        u, B_t, C_t = dt_t * x_t, B.at(i), C.at(i)
        h_before = [before[i * d_state + n] for n in range(d_state)]
        decay = [jnp.exp(dt_t * a) * keep[i, 0] for a in A]
        dh = [d + dy_t * c for d, c in zip(sums.dh, C_t)]
        d_exponent = [d * a * h for d, a, h in zip(dh, decay, h_before)]
        du = total(d * b for d, b in zip(dh, B_t))
        outputs[0][i] = (dt_t * du).astype(outputs[0].dtype)
        outputs[1][i] = total(d * a for d, a in zip(d_exponent, A)) + x_t * du
        dA = tuple(s + dt_t * d for s, d in zip(sums.dA, d_exponent))
        h = [a * h + u * b for a, h, b in zip(decay, h_before, B_t)]
        dB = tuple(s + u * d for s, d in zip(sums.dB, dh))
        dC = tuple(s + dy_t * h_n for s, h_n in zip(sums.dC, h))
        for n in range(d_state):
            before[i * d_state + n] = u * dh[n]
        return Sums(tuple(d * a for d, a in zip(dh, decay)), dA, dB, dC)

    return mosaic_gpu.repeat(tokens, one_token, sums)


def _sum_channels(rows, sums) -> None:
    """[128, 128] to [128], the tensor cores' layout of 64 rows at a time."""
    for start in range(0, PRODUCTS, 64):
        part = pl.ds(start, 64)
        sums[part] = jnp.sum(mosaic_gpu.load_plain(rows.at[part], MATRIX), axis=1)

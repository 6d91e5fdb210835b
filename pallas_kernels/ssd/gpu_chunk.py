"""What the GPU kernels of SSD share: the decays of a chunk, prepared by XLA, and their mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import mosaic_gpu
from pallas_kernels.mosaic_gpu import MATRIX, OF_COLUMNS, OF_ROWS, Tile, Value, load, over_columns, over_rows

CHUNK = 64  # Q: the rows of one warpgroup's matrix product
CHANNELS = 64  # of P a block works on: the state [64, 128] takes 64 registers of a thread


class Decays(NamedTuple):
    """float32, by token: small beside u [B, L, H, P], so XLA prepares them and the kernels read them."""

    alpha: Value  # [B, H, L] cumulative sum of log decays, inclusive, from the start of the chunk
    from_start: Value  # [B, H, L] e^alpha_i: from the chunk's start to i; 0 across a reset
    to_end: Value  # [B, H, L] e^(alpha_Q - alpha_i): from i to the chunk's end; 0 across a reset
    runs: Value = None  # [B, L] resets before, in this chunk; None where there are none

    def arrays(self) -> list:
        """Those there are, in order."""
        return [t for t in self if t is not None]

    def tiles(self, row, place: Callable) -> list[Tile]:
        """Of :meth:`arrays` (references to them); ``place`` gives (head, chunk) of a step."""

        def tile(ref) -> Tile:
            def index(step):
                head, chunk = place(step)
                tokens = pl.ds(chunk * CHUNK, CHUNK)
                return (row, head, tokens) if len(ref.shape) == 3 else (row, tokens)

            return Tile(ref, (CHUNK,), index)

        return [tile(ref) for ref in self.arrays()]


def decays(log_decay: jax.Array, runs: jax.Array | None) -> Decays:
    """Of log_decay [B, L, H] and runs [B, L] (``segments.reset_runs``), L a multiple of Q."""
    batch, length, heads = log_decay.shape
    by_chunk = log_decay.reshape(batch, -1, CHUNK, heads).transpose(0, 3, 1, 2)
    alpha = jnp.cumsum(by_chunk, axis=-1)
    start, end = alpha, alpha[..., -1:] - alpha
    if runs is not None:
        # Not at the chunk's start, but before it: the first token may be a reset itself.
        before = jnp.pad(runs[:, :-1], ((0, 0), (1, 0))).reshape(batch, 1, -1, CHUNK)[..., :1]
        here = runs.reshape(batch, 1, -1, CHUNK)
        start = jnp.where(here == before, start, -jnp.inf)
        end = jnp.where(here == here[..., -1:], end, -jnp.inf)
        runs = (here - before).reshape(batch, length).astype(jnp.float32)
    alpha, start, end = (t.reshape(batch, heads, length) for t in (alpha, jnp.exp(start), jnp.exp(end)))
    return Decays(alpha, start, end, runs)


def within(alpha, runs=None) -> Value:
    """e^(alpha_i - alpha_j) [Q, Q] of the references of one chunk; 0 for j > i and across a reset."""
    visible = mosaic_gpu.not_after(CHUNK)
    if runs is not None:
        i, j = over_columns(load(runs, OF_ROWS), CHUNK), over_rows(load(runs, OF_COLUMNS), CHUNK)
        visible = visible & (i == j)
    i, j = over_columns(load(alpha, OF_ROWS), CHUNK), over_rows(load(alpha, OF_COLUMNS), CHUNK)
    hidden = mosaic_gpu.full((CHUNK, CHUNK), -jnp.inf, MATRIX)
    return jnp.exp(jnp.where(visible, i - j, hidden))

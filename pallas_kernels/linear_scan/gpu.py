"""The linear scan on a GPU: channels across threads, h in registers, one token after the other.

Not yet run on a GPU (see ``pallas_kernels/mosaic_gpu.py``). A block walks one row of the batch and 128
channels; a and b come, and h goes, in tiles of time through shared memory, so that each is read or written
once. A complex array is two real ones, its parts. The backward is the scan the other way (``xla.py``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Inexact

from pallas_kernels import mosaic_gpu
from pallas_kernels.dispatch import unsuitable
from pallas_kernels.mosaic_gpu import THREADS, Tile, Value

TOKENS = 32  # of a tile: a, b and h, real, twice, take 96 KiB of shared memory
Parts = tuple[Value, ...]  # of a number: (real,) or (real, imaginary)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in a call."""

    reverse: bool
    tokens: int
    interpret: Any = None


def unsupported(a: jax.Array, b: jax.Array, state: jax.Array, reverse: bool) -> str | None:
    """Why the kernel cannot take the call, or None."""
    return unsuitable({"b": b}, jnp.float32, jnp.complex64)


def linear_scan(
    a: Inexact[Array, "B L D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B L D"],
    initial_state: Inexact[Array, "B D"],
    reverse: bool = False,
    interpret: Any = None,
) -> tuple[Inexact[Array, "B L D"], Inexact[Array, "B D"]]:
    """Same contract as ``xla.linear_scan``, in float32 or complex64."""
    # Complex numbers take twice the room.
    tokens = TOKENS // 2 if jnp.iscomplexobj(b) else TOKENS
    return _scan(a, b, initial_state, Config(reverse, tokens, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(a, b, state, config: Config):
    h = _call(a, b, state, config)
    return h, h[:, 0 if config.reverse else -1]


def _forward(a, b, state, config):
    h, final = _scan(a, b, state, config)
    return (h, final), (a, h, state)


def _backward(config, residuals, cotangents):
    """g_t = dh_t + a_{t+1} g_{t+1}: the same scan over a moved by one token, the other way."""
    a, h, state = residuals
    dh, d_final = cotangents
    first, last = (-1, 0) if config.reverse else (0, -1)
    dh = dh.at[:, last].add(d_final)
    a_after = (
        a if a.ndim == 1 else jnp.roll(a, 1 if config.reverse else -1, axis=1)
    )  # what wraps meets a zero
    other_way = dataclasses.replace(config, reverse=not config.reverse)
    g = _call(a_after, dh, jnp.zeros_like(state), other_way)
    if config.reverse:
        h_before = jnp.concatenate([h[:, 1:], state[:, None]], axis=1)
    else:
        h_before = jnp.concatenate([state[:, None], h[:, :-1]], axis=1)
    da = g * h_before
    if a.ndim == 1:
        return jnp.sum(da, axis=(0, 1)), g, a * g[:, first]
    return da, g, a[:, first] * g[:, first]


_scan.defvjp(_forward, _backward)


def step(a: Parts, h: Parts, b: Parts) -> Parts:
    """a h + b of numbers given by their parts."""
    if len(h) == 1:
        return (a[0] * h[0] + b[0],)
    return a[0] * h[0] - a[1] * h[1] + b[0], a[0] * h[1] + a[1] * h[0] + b[1]


def _call(a, b, state, config: Config) -> jax.Array:
    """h [B, L, D]. What is padded at the end decays nothing and writes nothing."""
    batch, length, channels = b.shape
    time = (0, -length % config.tokens)
    width = (0, -channels % THREADS)
    constant = a.ndim == 1
    a = jnp.pad(a, (width,)) if constant else jnp.pad(a, ((0, 0), time, width), constant_values=1)
    b, state = jnp.pad(b, ((0, 0), time, width)), jnp.pad(state, ((0, 0), width))
    operands = [_parts(t) for t in (a, b, state)]
    size = len(operands[1])
    out = jax.ShapeDtypeStruct(b.shape, jnp.float32)
    planes = mosaic_gpu.gpu_call(
        functools.partial(_kernel, config, constant, size),
        name="linear_scan",
        grid={"channels": b.shape[2] // THREADS, "row": batch},
        out_type=[out] * size,
        private_rows=True,
        interpret=config.interpret,
    )(*(part for parts in operands for part in parts))
    h = planes[0] if size == 1 else jax.lax.complex(*planes)
    return h[:, :length, :channels]


def _parts(t: jax.Array) -> Parts:
    return (t.real, t.imag) if jnp.iscomplexobj(t) else (t,)


def _kernel(config: Config, constant: bool, size: int, *refs) -> None:
    a, b, state, h = (refs[i : i + size] for i in range(0, 4 * size, size))
    row, channels = mosaic_gpu.block("row"), pl.ds(mosaic_gpu.block("channels") * THREADS, THREADS)
    tiles = b[0].shape[1] // config.tokens

    def tile(ref) -> Tile:
        def index(n):
            n = tiles - 1 - n if config.reverse else n
            return row, pl.ds(n * config.tokens, config.tokens), channels

        return Tile(ref, (config.tokens, THREADS), index)

    always = tuple(ref[channels] for ref in a) if constant else None

    def walk_tile(_, inputs: Sequence, outputs: Sequence, carry: Parts) -> Parts:
        b_tile, a_tile = inputs[:size], inputs[size:]

        def one_token(i, h_t: Parts) -> Parts:
            i = config.tokens - 1 - i if config.reverse else i
            a_t = always or tuple(ref[i] for ref in a_tile)
            h_t = step(a_t, h_t, tuple(ref[i] for ref in b_tile))
            for ref, part in zip(outputs, h_t):
                ref[i] = part
            return h_t

        return mosaic_gpu.repeat(config.tokens, one_token, carry)

    sources = [*b, *(() if constant else a)]
    start = tuple(ref[row, channels] for ref in state)
    mosaic_gpu.walk(tiles, [tile(ref) for ref in sources], [tile(ref) for ref in h], walk_tile, start)

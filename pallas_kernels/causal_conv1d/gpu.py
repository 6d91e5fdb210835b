"""The causal convolution on a GPU: channels across threads, the last K inputs in registers.

Not yet run on a GPU (see ``pallas_kernels/mosaic_gpu.py``). A block walks one strip of time of one row of the
batch; the K-1 inputs before the strip it reads by itself. The backward computes the activation again, and
leaves a partial sum of the weights' gradient for each strip.

A token's mask is one number: how many inputs before it it sees, -1 at padding.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic_gpu
from pallas_kernels.causal_conv1d import xla
from pallas_kernels.dispatch import unsuitable
from pallas_kernels.mosaic_gpu import THREADS, Tile, Value

TOKENS = 32  # of a tile in shared memory
TILES = 8  # of a strip
MAX_TAPS = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static in a call."""

    activation: str | None
    interpret: Any = None


def unsupported(x, weight, bias, state, segment_ids, activation) -> str | None:
    """Why the kernel cannot take the call, or None."""
    arrays = {"x": x, "weight": weight, "bias": bias}
    if reason := unsuitable(arrays, jnp.float32, jnp.bfloat16, jnp.float16):
        return reason
    if weight.shape[0] > MAX_TAPS:
        return f"K = {weight.shape[0]} taps are more than {MAX_TAPS}, the inputs a thread keeps in registers"
    return None


def causal_conv1d(
    x: Float[Array, "B L C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, " C"],
    initial_state: Float[Array, "B K-1 C"],
    segment_ids: Int[Array, "B L"] | None,
    activation: str | None,
    interpret: Any = None,
) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """Same contract as ``xla.causal_conv1d``."""
    y = _convolve(x, weight, bias, initial_state, segment_ids, Config(activation, interpret))
    return y, xla.last_inputs(x, initial_state, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolve(x, weight, bias, state, segment_ids, config):
    return _forward(x, weight, bias, state, segment_ids, config)[0]


def _forward(x, weight, bias, state, segment_ids, config):
    (y,) = _call(_forward_kernel, config, x, weight, bias, state, segment_ids)
    return y, (x, weight, bias, state, segment_ids)


def _backward(config, residuals, dy):
    x, weight, bias, state, segment_ids = residuals
    dx, d_weight, d_bias = _call(_backward_kernel, config, x, weight, bias, state, segment_ids, dy)
    d_state = _state_gradient(x, weight, bias, state, segment_ids, dy, config)
    sums = (d.sum(axis=(0, 1)).astype(t.dtype) for d, t in ((d_weight, weight), (d_bias, bias)))
    return dx, *sums, d_state, None


_convolve.defvjp(_forward, _backward)


def _first_real(segment_ids: jax.Array) -> jax.Array:
    """[B]: the state stands before this token (0 in a row of padding)."""
    return jnp.argmax(segment_ids != 0, axis=1).astype(jnp.int32)


def _state_gradient(x, weight, bias, state, segment_ids, dy, config) -> jax.Array:
    """By way of y: only the first K-1 real tokens see the state."""
    length, past = x.shape[1], state.shape[1]
    if past == 0:
        return jnp.zeros_like(state)
    if segment_ids is None:
        x, dy = x[:, :past], dy[:, :past]
    else:
        at = _first_real(segment_ids)[:, None] + jnp.arange(past)
        inside = jnp.minimum(at, length - 1)
        x, dy = (jnp.take_along_axis(t, inside[..., None], axis=1) for t in (x, dy))
        segment_ids = jnp.where(at < length, jnp.take_along_axis(segment_ids, inside, axis=1), 0)

    def piece(state):
        return xla.causal_conv1d(x, weight, bias, state, segment_ids, config.activation)[0]

    return jax.vjp(piece, state)[1](dy)[0]


def _call(kernel, config: Config, x, weight, bias, state, segment_ids, dy=None) -> list[jax.Array]:
    """The forward kernel, or with ``dy`` the backward one; inputs padded to whole tiles."""
    batch, length, channels = x.shape
    width = THREADS * 4 // x.dtype.itemsize
    time, columns = (0, -length % TOKENS), (0, -channels % width)
    x, dy = (t if t is None else jnp.pad(t, ((0, 0), time, columns)) for t in (x, dy))
    weight, bias = (jnp.pad(t.astype(jnp.float32), ((0, 0), columns)) for t in (weight, bias[None]))
    state = jnp.pad(state.astype(x.dtype), ((0, 0), (0, 1), columns))  # a last row for K = 1
    arrays = {"x": x, "weight": weight, "bias": bias, "state": state}
    if dy is not None:
        arrays["dy"] = dy
    if segment_ids is not None:
        seen = xla.reach(segment_ids, weight.shape[0]) - 1
        arrays["seen"] = jnp.pad(seen, ((0, 0), time), constant_values=-1)
        arrays["first"] = _first_real(segment_ids)
    strips = pl.cdiv(x.shape[1], TOKENS * TILES)
    out_type = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    if dy is not None:
        for rows in (weight.shape[0], 1):
            out_type.append(jax.ShapeDtypeStruct((batch, strips, rows, x.shape[2]), jnp.float32))
    names = tuple(arrays)

    def body(*refs):
        inputs = dict(zip(names, refs))
        kernel(Block(inputs, width, weight.shape[0]), config, *refs[len(names) :])

    outputs = mosaic_gpu.gpu_call(
        body,
        name="causal_conv1d" if dy is None else "causal_conv1d_backward",
        grid={"channels": x.shape[2] // width, "strip": strips, "row": batch},
        out_type=out_type,
        private_rows=True,
        interpret=config.interpret,
    )(*arrays.values())
    y, *sums = (t[..., :channels] for t in outputs)
    return [y[:, :length], *(sums[:1]), *(t[:, :, 0] for t in sums[1:])]


class Block:
    """What one block works on: a strip of time of one row, ``width`` channels. References by name."""

    def __init__(self, refs: dict[str, Any], width: int, taps: int):
        self.refs, self.taps, self.width = refs, taps, width
        self.row, self.strip = mosaic_gpu.block("row"), mosaic_gpu.block("strip")
        self.channels = pl.ds(mosaic_gpu.block("channels") * width, width)
        self.length = refs["x"].shape[1]
        self.start = self.strip * (TILES * TOKENS)
        self.tiles = jnp.minimum(TILES, self.length // TOKENS - self.strip * TILES)
        self.masked = "seen" in refs
        self.first = refs["first"][self.row] if self.masked else jnp.int32(0)
        self.weight = [refs["weight"][k, self.channels] for k in range(taps)]
        self.bias = refs["bias"][0, self.channels]
        self.state = tuple(self.read("state", k) for k in range(taps - 1))

    def read(self, name: str, t) -> Value:
        """Token ``t`` of x, dy or the state, from global memory."""
        return self.refs[name][self.row, t, self.channels].astype(jnp.float32)

    def tile(self, ref) -> Tile:
        """The n-th tile of the strip, of an array [B, L, C] or [B, L]."""

        def index(n):
            return (self.row, pl.ds(self.start + n * TOKENS, TOKENS), self.channels)[: len(ref.shape)]

        return Tile(ref, (TOKENS, self.width)[: len(ref.shape) - 1], index)

    def past(self) -> tuple[Value, ...]:
        """The K-1 inputs before the strip; those before the first real token are the state."""
        inputs = []
        for back in range(self.taps - 1, 0, -1):
            t = self.start - back
            in_state = jnp.clip(t - self.first + self.taps - 1, 0, self.taps - 2)
            token = self.read("x", jnp.maximum(t, 0))
            inputs.append(jnp.where(t < self.first, self.read("state", in_state), token))
        return tuple(inputs)

    def window(self, t, past, x_t, seen) -> tuple[Value, ...]:
        """The K inputs at token ``t``, the oldest first."""
        if seen is not None:
            past = tuple(jnp.where(t == self.first, s, p) for s, p in zip(self.state, past))
        return *past, x_t

    def before_activation(self, window, seen) -> Value:
        """Bias and weighted taps of a token."""
        total = self.bias
        for k, (w, x) in enumerate(zip(self.weight, window)):
            total = total + w * self.visible(k, seen, x)
        return total

    def visible(self, k: int, seen, value: Value) -> Value:
        """``value`` of tap k, 0 where the token does not see that far back."""
        return value if seen is None else jnp.where(seen >= self.taps - 1 - k, value, 0.0)


def _forward_kernel(block: Block, config: Config, y) -> None:
    def walk_tile(n, inputs, outputs, past):
        def one_token(i, past):
            t = block.start + n * TOKENS + i
            seen = inputs[1][i] if block.masked else None
            window = block.window(t, past, inputs[0][i].astype(jnp.float32), seen)
            value = block.before_activation(window, seen)
            value = value * mosaic_gpu.sigmoid(value) if config.activation == "silu" else value
            value = value if seen is None else jnp.where(seen >= 0, value, 0.0)
            outputs[0][i] = value.astype(y.dtype)
            return window[1:]

        return mosaic_gpu.repeat(TOKENS, one_token, past)

    sources = [block.refs["x"], *([block.refs["seen"]] if block.masked else [])]
    mosaic_gpu.walk(
        block.tiles, [block.tile(ref) for ref in sources], [block.tile(y)], walk_tile, block.past()
    )


class Sums(NamedTuple):
    """Carried through the backward."""

    past: tuple[Value, ...]  # K-1 inputs
    pending: tuple[Value, ...]  # gradients of the last K-1 inputs, as far as later tokens have added
    weight: tuple[Value, ...]
    bias: Value


def _backward_kernel(block: Block, config: Config, dx, d_weight, d_bias) -> None:
    """dx_s = sum over the K tokens t from s on of weight_{K-1-(t-s)} d_t, with d the gradient before act."""

    def add_token(t, x_t, dy_t, seen, sums: Sums) -> Sums:
        window = block.window(t, sums.past, x_t, seen)
        d = dy_t
        if config.activation == "silu":
            value = block.before_activation(window, seen)
            sigmoid = mosaic_gpu.sigmoid(value)
            d = d * sigmoid * (1.0 + value * (1.0 - sigmoid))
        d = d if seen is None else jnp.where(seen >= 0, d, 0.0)
        of_inputs = [p + block.visible(k, seen, block.weight[k] * d) for k, p in enumerate(sums.pending)]
        of_inputs.append(block.weight[-1] * d)
        done = t - (block.taps - 1)

        @mosaic_gpu.when(done >= block.start)
        def _():
            value = jnp.where(done >= block.first, of_inputs[0], 0.0)  # before: of the state, or padding
            dx[block.row, done, block.channels] = value.astype(dx.dtype)

        of_weight = tuple(
            s + block.visible(k, seen, x) * d for k, (s, x) in enumerate(zip(sums.weight, window))
        )
        return Sums(window[1:], tuple(of_inputs[1:]), of_weight, sums.bias + d)

    def walk_tile(n, inputs, _, sums):
        def one_token(i, sums):
            x_t, dy_t = (ref[i].astype(jnp.float32) for ref in inputs[:2])
            seen = inputs[2][i] if block.masked else None
            return add_token(block.start + n * TOKENS + i, x_t, dy_t, seen, sums)

        return mosaic_gpu.repeat(TOKENS, one_token, sums)

    zero = mosaic_gpu.zero_row(block.width)
    sums = Sums(block.past(), (zero,) * (block.taps - 1), (zero,) * block.taps, zero)
    names = ["x", "dy", *(["seen"] if block.masked else [])]
    sums = mosaic_gpu.walk(block.tiles, [block.tile(block.refs[n]) for n in names], [], walk_tile, sums)
    for k in range(block.taps):
        d_weight[block.row, block.strip, k, block.channels] = sums.weight[k]
    d_bias[block.row, block.strip, 0, block.channels] = sums.bias
    # The strip's last inputs are also seen by the first tokens of the next one.
    end = block.start + block.tiles * TOKENS
    for i in range(block.taps - 1):
        t = jnp.minimum(end + i, block.length - 1)
        exists = end + i < block.length
        x_t, dy_t = block.read("x", t), jnp.where(exists, block.read("dy", t), 0.0)
        seen = jnp.where(exists, block.refs["seen"][block.row, t], -1) if block.masked else None
        sums = add_token(end + i, x_t, dy_t, seen, sums)

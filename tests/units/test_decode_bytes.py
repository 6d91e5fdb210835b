"""One-token steps on TPU: XLA reads a state once and writes it once, so they have no kernels."""

import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo_bytes
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd
from runtime import aot


def of(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def mamba1(batch: int):
    """2.8B."""
    low, channels, d_state = jnp.bfloat16, 5120, 16
    vector = of(batch, 1, d_state, dtype=low)
    x, state = of(batch, 1, channels, dtype=low), of(batch, channels, d_state)
    return x, of(batch, 1, channels), of(channels, d_state), vector, vector, of(channels), state


def mamba2(batch: int):
    """2.7B."""
    low, heads, headdim, d_state = jnp.bfloat16, 80, 64, 128
    vector = of(batch, 1, 1, d_state, dtype=low)
    x, state = of(batch, 1, heads, headdim, dtype=low), of(batch, heads, headdim, d_state)
    return x, of(batch, 1, heads), of(heads), vector, vector, of(heads), state


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.parametrize(
    "op, shapes, chip, batch",
    [(selective_scan, mamba1, "v5e", 1), (selective_scan, mamba1, "v6e", 8), (ssd, mamba2, "v5p", 8)],
)
def test_one_token_moves_what_it_must(op, shapes, chip, batch):
    args = shapes(batch)

    def step(*args):
        return op(*args[:-1], initial_state=args[-1])

    text = aot.compile_for(chip, step, *args).as_text()
    assert "tpu_custom_call" not in text
    moved = sum(row.bytes for row in hlo_bytes.count(step, text, *args))
    buffers = (*args, args[0], args[-1])  # what goes in, and y and the state that come out
    assert moved <= 1.07 * sum(math.prod(t.shape) * t.dtype.itemsize for t in buffers)

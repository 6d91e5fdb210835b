"""The causal convolution's TPU kernels: equal to the reference, free of races, and they compile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.causal_conv1d import causal_conv1d, reference, tpu
from runtime import aot
from tests.races import CHECKED, assert_no_races
from tests.units.test_causal_conv1d import SEGMENTS, assert_close, inputs, outputs_and_gradients

# Blocks of 128 tokens: padding longer than a block before the first token, which stands in reach of a block's
# edge; segments shorter than K across an edge; a row of padding.
LONG = np.ones((4, 300), np.int32)
LONG[0, 126:129], LONG[0, 129:] = 2, 3
LONG[1, :257], LONG[1, 260:] = 0, 0
LONG[2] = 0
LONG[3, :127], LONG[3, 130:255] = 0, 9
LONG = jnp.asarray(LONG)


def blocks(channels=16, tokens=128):
    return tuning.forced("causal_conv1d", {"channels": channels, "tokens": tokens})


@pytest.mark.parametrize("packed", [False, True])
def test_equals_reference(packed):
    ids = SEGMENTS if packed else None
    expected = outputs_and_gradients(inputs(), ids, implementation="reference")
    assert_close(outputs_and_gradients(inputs(), ids, implementation="interpret"), expected)


@pytest.mark.parametrize("length, width, activation", [(1, 4, "silu"), (2, 4, None), (24, 1, None)])
def test_equals_reference_at_any_length_and_width(length, width, activation):
    args, ids = inputs(length, width), SEGMENTS[:, :length]
    run = functools.partial(outputs_and_gradients, args, ids, activation=activation)
    assert_close(run(implementation="interpret"), run(implementation="reference"))


@pytest.fixture(scope="module")
def long_expected():
    args = inputs(300, channels=40)
    return {
        packed: outputs_and_gradients(args, LONG if packed else None, implementation="reference")
        for packed in (False, True)
    }


@pytest.mark.parametrize("packed", [False, True])
def test_equals_reference_over_ragged_blocks(long_expected, packed):
    args = inputs(300, channels=40)
    with blocks():
        actual = outputs_and_gradients(args, LONG if packed else None, implementation="interpret")
    assert_close(actual, long_expected[packed], tolerance=5e-6)
    with blocks():
        again = outputs_and_gradients(args, LONG if packed else None, implementation="interpret")
    jax.tree.map(np.testing.assert_array_equal, actual, again)


def test_bfloat16_is_close_to_float32(long_expected):
    args = inputs(300, channels=40)
    low = args | {"x": args["x"].astype(jnp.bfloat16)}
    outputs, gradients = outputs_and_gradients(low, LONG, implementation="interpret")
    assert outputs[0].dtype == jnp.bfloat16 and gradients["weight"].dtype == jnp.float32
    assert_close((outputs, gradients), long_expected[True], tolerance=1e-2)


def test_no_races():
    """Values too: memory that nobody wrote is NaN there."""
    args, ids = inputs(140, batch=1, channels=16), LONG[3:, 120:260]
    zero, width = jnp.zeros((1, 3, 16)), 4

    @functools.partial(jax.jit, static_argnums=0)
    def run(interpret, x, weight, bias, past):
        def op(*inputs):
            if interpret is None:
                return reference.causal_conv1d(*inputs, ids, "silu")
            return tpu.causal_conv1d(*inputs, ids, "silu", interpret=interpret)

        (y, _), vjp = jax.vjp(op, x, weight, bias, past)
        return y, vjp((jnp.cos(y), zero))

    assert args["weight"].shape[0] == width
    with blocks():
        actual = assert_no_races(run, CHECKED, *args.values())
    assert_close(actual, run(None, *args.values()), tolerance=5e-6)


def test_what_it_does_not_take_is_named():
    args = inputs(8)
    with pytest.raises(
        ValueError, match="x is float16, and the kernels take float32 or bfloat16; .* Or use 'xla'"
    ):
        causal_conv1d(**args | {"x": args["x"].astype(jnp.float16)}, implementation="interpret")
    with pytest.raises(ValueError, match="K = 200 taps are more than 128; use long_conv"):
        causal_conv1d(**inputs(8, width=200), implementation="interpret")


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.parametrize(
    "chip, channels, length, packed, dtype",
    [
        ("v5e", 5120, 8192, True, jnp.bfloat16),
        ("v5p", 1536, 2000, False, jnp.bfloat16),
        ("v6e", 8192, 4096, True, jnp.float32),
    ],
)
def test_compiles_for_tpu(chip, channels, length, packed, dtype):
    shape = jax.ShapeDtypeStruct
    x, f32 = shape((1, length, channels), dtype), jnp.float32
    weight, bias, past = shape((4, channels), f32), shape((channels,), f32), shape((1, 3, channels), dtype)
    ids = shape((1, length), jnp.int32) if packed else None

    def run(x, weight, bias, past, ids, dy):
        def op(x, weight, bias, past):
            return causal_conv1d(x, weight, bias, initial_state=past, segment_ids=ids, activation="silu")[0]

        y, vjp = jax.vjp(op, x, weight, bias, past)
        return y, vjp(dy)

    text = aot.compile_for(chip, run, x, weight, bias, past, ids, x).as_text()
    assert "causal_conv1d_forward" in text and "causal_conv1d_backward" in text

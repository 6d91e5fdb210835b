"""The linear scan's TPU kernels: equal to the reference, free of races, and they compile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.linear_scan import linear_scan, reference, tpu
from runtime import aot
from tests.races import CHECKED, assert_no_races
from tests.units.test_linear_scan import SEGMENTS, assert_close, expected, inputs, outputs_and_gradients


def interpreted(args, segment_ids=None, reverse=False, tokens=512, channels=512):
    """Traced anew, with these blocks."""
    with tuning.forced("linear_scan", {"tokens": tokens, "channels": channels}):
        run = functools.partial(outputs_and_gradients.__wrapped__, implementation="interpret")
        return jax.jit(lambda args, ids: run(args, ids, reverse=reverse))(args, segment_ids)


@pytest.mark.parametrize(
    "kind, packed, reverse, tokens",
    [
        ("real", False, False, 512),
        ("real", True, True, 16),  # 24 tokens: a ragged block
        ("complex", True, False, 8),
        ("complex", False, True, 16),
        ("constant", False, False, 16),
        ("constant", False, True, 16),
    ],
)
def test_equals_reference(kind, packed, reverse, tokens):
    actual = interpreted(inputs(kind), SEGMENTS if packed else None, reverse, tokens)
    assert_close(actual, expected(kind, packed, reverse), tolerance=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_equals_reference_over_ragged_blocks(reverse):
    args = inputs("real", length=19, batch=2, width=200)
    wanted = outputs_and_gradients(args, reverse=reverse, implementation="reference")
    actual = interpreted(args, None, reverse, tokens=8, channels=128)
    assert_close(actual, wanted, tolerance=2e-6)
    again = interpreted(args, None, reverse, tokens=8, channels=128)
    jax.tree.map(np.testing.assert_array_equal, actual, again)


@pytest.mark.parametrize("kind, length", [("real", 3), ("constant", 1)])
def test_equals_reference_at_few_tokens(kind, length):
    args, ids = inputs(kind, length), SEGMENTS[:, 2 : 2 + length]
    wanted = outputs_and_gradients(args, ids, implementation="reference")
    assert_close(interpreted(args, ids), wanted, tolerance=2e-6)


def test_strong_decay():
    """Decays that multiply to exp(-200) and below in a block, and some that are zero."""
    args = inputs("real")
    decay = jnp.exp(-jnp.linspace(1.0, 60.0, 24))[:, None]
    args["a"] = args["a"].at[0].set(decay).at[1].set(decay[::-1]).at[2, ::3].set(0.0)
    wanted = outputs_and_gradients(args, implementation="reference")
    assert_close(interpreted(args), wanted, tolerance=2e-6)


def test_what_comes_later_is_never_seen():
    args = inputs("real")
    run = jax.jit(lambda args: linear_scan(**args, implementation="interpret")[0])
    h = run(args)
    args["b"] = args["b"].at[:, 11].set(jnp.nan)
    np.testing.assert_array_equal(run(args)[:, :11], h[:, :11])


def test_bfloat16_is_computed_in_float32():
    low = {name: value.astype(jnp.bfloat16) for name, value in inputs("real").items()}
    h, state = linear_scan(**low, implementation="interpret")
    wanted, wanted_state = linear_scan(**low, implementation="reference")
    assert h.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_close((h.astype(jnp.float32), state), (wanted.astype(jnp.float32), wanted_state), tolerance=4e-3)


def test_no_races():
    """Values too: memory that nobody wrote is NaN there."""
    args = inputs("real", length=19, batch=2, width=200)

    @functools.partial(jax.jit, static_argnums=0)
    def run(interpret, a, b, state):
        def op(*inputs):
            if interpret is None:
                return reference.linear_scan(*inputs)
            return tpu.linear_scan(*inputs, interpret=interpret)

        h, vjp = jax.vjp(op, a, b, state)
        return h, vjp(jax.tree.map(jnp.cos, h))

    with tuning.forced("linear_scan", {"tokens": 8, "channels": 128}):
        actual = assert_no_races(functools.partial(run, CHECKED), *args.values())
    assert_close(actual, run(None, *args.values()), tolerance=2e-6)


def test_what_it_does_not_take_is_named():
    with jax.enable_x64(True):
        args = {name: value.astype(jnp.float64) for name, value in inputs("real").items()}
        with pytest.raises(
            ValueError, match="a is float64, and the kernels take float32 or complex64; cast it"
        ):
            linear_scan(**args, implementation="interpret")


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.parametrize(
    "chip, kind, length, channels, reverse",
    [
        ("v5e", "real", 8192, 2560, False),
        ("v5e", "complex", 2048, 1536, True),
        ("v5p", "constant", 8192, 384, False),
        ("v5p", "real", 5, 6, True),
        ("v6e", "constant", 2000, 1000, True),
        ("v6e", "complex", 4096, 4096, False),
    ],
)
def test_compiles_for_tpu(chip, kind, length, channels, reverse):
    dtype = jnp.float32 if kind == "real" else jnp.complex64
    b, state = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, length, channels), (1, channels)))
    a = jax.ShapeDtypeStruct((channels,), dtype) if kind == "constant" else b

    def run(a, b, state, dh, d_final):
        def op(a, b, state):
            return linear_scan(a, b, initial_state=state, reverse=reverse)

        h, vjp = jax.vjp(op, a, b, state)
        return h, vjp((dh, d_final))

    text = aot.compile_for(chip, run, a, b, state, b, state).as_text()
    assert "linear_scan_backward" in text

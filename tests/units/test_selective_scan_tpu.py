"""The selective scan's TPU kernels: equal to the reference, free of races, and they compile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.segments import reset_runs
from pallas_kernels.selective_scan import reference, selective_scan, tpu
from runtime import aot
from tests.races import CHECKED, assert_no_races
from tests.units.test_selective_scan import (
    SEGMENTS,
    assert_close,
    expected,
    inputs,
    outputs_and_gradients,
)

# Two blocks of 128 tokens, the second ragged; segments over the edge and shorter than a tile of eight tokens;
# padding at the edge.
LONG = np.repeat([[3, 0, 1, 2, 0, 5, 6], [0, 0, 4, 4, 7, 0, 0]], [5, 3, 100, 2, 30, 1, 9], axis=1)
LONG = jnp.asarray(LONG, jnp.int32)


interpreted = functools.partial(outputs_and_gradients, implementation="interpret")


@pytest.mark.parametrize(
    "kind, packed", [("token", False), ("groups", True), ("constant", True), ("complex", True)]
)
def test_equals_reference(kind, packed):
    actual = interpreted(inputs(kind), SEGMENTS if packed else None)
    assert_close(actual, expected(kind, packed), tolerance=4e-6)


@pytest.fixture(scope="module")
def long():
    args = inputs(length=150, batch=2, channels=256, d_state=12)
    return args, outputs_and_gradients(args, LONG, implementation="reference")


def test_equals_reference_over_ragged_blocks(long):
    args, wanted = long
    with tuning.forced("selective_scan", {"tokens": 128, "channels": 256, "lanes": 128}):
        actual, again = interpreted(args, LONG), interpreted(args, LONG)
    assert_close(actual, wanted, tolerance=4e-6)
    jax.tree.map(np.testing.assert_array_equal, actual, again)


def test_bfloat16_is_close_to_float32(long):
    args, wanted = long
    low = {name: args[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    outputs, gradients = interpreted(args | low, LONG)
    assert outputs[0].dtype == gradients["x"].dtype == jnp.bfloat16
    assert_close((outputs, gradients), wanted, tolerance=2e-2)


def test_equals_reference_at_few_tokens(length=3):
    args, ids = inputs(length=length), SEGMENTS[:, 9 : 9 + length]
    wanted = outputs_and_gradients(args, ids, implementation="reference")
    assert_close(interpreted(args, ids), wanted, tolerance=4e-6)


def test_strong_decay():
    """dt A sums to -200 in a tile of eight tokens and to far less; some tokens keep a mild decay."""
    args = inputs() | {"A": -jnp.ones((8, 4))}
    args["dt"] = args["dt"].at[:, ::2].set(50.0).at[:, 1::8].set(1e30)
    args["x"] = args["x"] / args["dt"]
    actual, gradients = interpreted(args)
    wanted, wanted_gradients = outputs_and_gradients(args, implementation="reference")
    assert_close(actual, wanted, tolerance=4e-6)
    for name in ("x", "B", "C", "initial_state"):
        assert_close(gradients[name], wanted_gradients[name], tolerance=4e-6)
    assert all(np.isfinite(g).all() for g in gradients.values())


def test_no_races():
    """Values too: memory that nobody wrote is NaN there."""
    args = inputs(length=16, batch=1, channels=256, d_state=4)
    del args["D"]
    ids = LONG[1:, 120:136]
    args["dt"] = jnp.where((ids != 0)[..., None], args["dt"], 0)
    args |= {name: args[name][:, :, None] for name in "BC"}

    @functools.partial(jax.jit, static_argnums=0)
    def run(interpret, *args):
        def op(*args):
            if interpret is None:
                return reference.selective_scan(*args, reset_runs(ids))
            return tpu.selective_scan(*args, reset_runs(ids), interpret=interpret)

        outputs, vjp = jax.vjp(op, *args)
        return outputs, vjp(jax.tree.map(jnp.cos, outputs))

    with tuning.forced("selective_scan", {"tokens": 128, "channels": 128}):
        actual = assert_no_races(functools.partial(run, CHECKED), *args.values())
    assert_close(actual, run(None, *args.values()), tolerance=4e-6)


def test_what_it_does_not_take_is_named():
    args = inputs()
    low = args | {"x": args["x"].astype(jnp.float16)}
    with pytest.raises(
        ValueError, match="x is float16, and the kernels take float32 or bfloat16 or complex64; cast"
    ):
        selective_scan(**low, implementation="interpret")
    with pytest.raises(ValueError, match="with N = 400 a block of 128 tokens takes .* may take 48; lower N"):
        selective_scan(**inputs(d_state=400), implementation="interpret")
    two, four = jnp.zeros((4, 40, 2, 4)), jnp.zeros((4, 40, 4, 4))
    reason = tpu.unsupported(args["x"], args["dt"], args["A"], two, four, args["initial_state"], None)
    assert reason == "B and C have 2 and 4 groups; repeat the fewer to as many as the others"


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.parametrize(
    "chip, kind, channels, d_state, length, packed",
    [
        ("v5e", "token", 1536, 16, 8192, True),
        ("v5p", "token", 5120, 16, 2048, False),
        ("v5p", "constant", 60, 20, 40, True),
        ("v6e", "groups", 600, 16, 1000, False),
        ("v6e", "complex", 256, 4, 2000, True),
    ],
)
def test_compiles_for_tpu(chip, kind, channels, d_state, length, packed):
    small = inputs(kind, length=1, batch=1, channels=2, d_state=1)
    sizes = {"x": (1, length, channels), "D": (channels,), "A": (channels, d_state)}
    sizes |= {"dt": sizes["x"], "initial_state": (1, channels, d_state)}
    vector = {"constant": (channels, d_state), "groups": (1, length, 2, d_state)}
    sizes |= dict.fromkeys("BC", vector.get(kind, (1, length, d_state)))
    args = {name: jax.ShapeDtypeStruct(sizes[name], t.dtype) for name, t in small.items()}
    args["x"] = jax.ShapeDtypeStruct(sizes["x"], jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if packed else None

    def run(args, ids, cotangents):
        outputs, vjp = jax.vjp(lambda args: selective_scan(**args, segment_ids=ids), args)
        return outputs, vjp(cotangents)

    cotangents = args["x"], args["initial_state"]
    text = aot.compile_for(chip, run, args, ids, cotangents).as_text()
    assert "selective_scan_backward" in text

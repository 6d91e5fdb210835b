"""A Mamba-2 layer's fused op: equal to the chain of ops, in values and in every gradient."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import mamba2_bytes
from pallas_kernels import tuning
from pallas_kernels.causal_conv1d import xla as conv_xla
from pallas_kernels.mamba2 import Form, Inputs, Weights, gated_ssd, tpu
from runtime import aot
from tests.races import CHECKED, assert_no_races
from tests.units import test_ssd
from tests.units.test_ssd import SEGMENTS

H, P, N, G, K = 4, 8, 16, 2, 4
assert_close = functools.partial(test_ssd.assert_close, tolerance=1e-4)


def arguments(length=48, batch=4, bias=True, norm=True):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    sizes = {"x": H * P, "B": G * N, "C": G * N}
    inputs = Inputs(
        z=normal(batch, length, H * P),
        **{name: normal(batch, length, size) for name, size in sizes.items()},
        dt=normal(batch, length, H) - 1,
    )
    weights = Weights(
        conv={name: (normal(K, size), normal(size) if bias else None) for name, size in sizes.items()},
        dt_bias=normal(H),
        A=-jnp.exp(normal(H)),
        D=normal(H),
        norm=normal(H * P) if norm else None,
    )
    past = {name: normal(batch, K - 1, size) for name, size in sizes.items()}
    return inputs, weights, past, normal(batch, H, P, N)


FORM = Form(G)


@functools.partial(jax.jit, static_argnames=("form", "implementation", "interpret"))
def outputs_and_gradients(args, segment_ids=None, form=FORM, implementation="interpret", interpret=None):
    """All that comes out, and the gradient of all that goes in, with cotangents on every output."""

    def run(inputs, weights, past, state):
        if interpret is not None:
            return tpu.gated_ssd(inputs, weights, past, state, segment_ids, form, interpret=interpret)
        return gated_ssd(
            inputs,
            weights,
            form,
            conv_state=past,
            initial_state=state,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    outputs, vjp = jax.vjp(run, *args)
    cotangents = jax.tree.map(lambda t: jnp.cos(jnp.arange(t.size, dtype=t.dtype)).reshape(t.shape), outputs)
    return outputs, vjp(cotangents)


@pytest.fixture(scope="module")
def expected():
    return {
        packed: outputs_and_gradients(arguments(), SEGMENTS if packed else None, implementation="reference")
        for packed in (False, True)
    }


@pytest.mark.parametrize("packed", [False, True])
def test_the_chain_equals_the_reference(expected, packed):
    actual = outputs_and_gradients(arguments(), SEGMENTS if packed else None, implementation="xla")
    assert_close(actual, expected[packed])


@pytest.mark.parametrize("packed, chunk", [(False, 16), (True, 8)])
def test_fused_equals_the_reference(expected, packed, chunk):
    """Chunks shorter than the segments and longer; padding before, between, after; a row of padding."""
    form, ids = Form(G, chunk_size=chunk), SEGMENTS if packed else None
    with tuning.forced("gated_ssd", {"part": 1 if packed else 2}):
        actual = outputs_and_gradients(arguments(), ids, form)
        again = outputs_and_gradients(arguments(), ids, form)
    assert_close(actual, expected[packed])
    jax.tree.map(np.testing.assert_array_equal, actual, again)


def test_fused_without_norm_bias_or_whole_chunks_in_bfloat16():
    """19 tokens, some of which decay by e^-200; against the chain in float32."""
    inputs, weights, past, state = arguments(19, batch=1, bias=False, norm=False)
    inputs = inputs._replace(dt=inputs.dt.at[:, ::3].set(200.0))
    weights = weights._replace(A=-jnp.ones(H))
    low = jax.tree.map(lambda t: t.astype(jnp.bfloat16), (inputs, past))
    args = (low[0], weights, low[1], state)
    outputs, gradients = outputs_and_gradients(args, form=Form(G, dt_limit=(0.0, 200.0)))
    assert outputs[0].dtype == jnp.bfloat16 and outputs[2].dtype == jnp.float32
    wide = jax.tree.map(lambda t: t.astype(jnp.float32), args)
    expected, _ = outputs_and_gradients(wide, form=Form(G, dt_limit=(0.0, 200.0)), implementation="xla")
    test_ssd.assert_close(outputs, expected, tolerance=2e-2)
    assert all(np.isfinite(g.astype(np.float32)).all() for g in jax.tree.leaves(gradients))


def test_no_races(monkeypatch):
    """Values too: memory that nobody wrote is NaN there. The convolutions of B and C are left to XLA: the
    interpreter that looks for races takes one kernel at a time, and those two run side by side."""
    monkeypatch.setattr(tpu.conv_tpu, "causal_conv1d", lambda *args, interpret: conv_xla.causal_conv1d(*args))
    args, ids = arguments(16, batch=1), SEGMENTS[3:, :16]
    run = functools.partial(outputs_and_gradients, segment_ids=ids, form=Form(G, chunk_size=8))
    with tuning.forced("gated_ssd", {"part": 1}):
        actual = assert_no_races(functools.partial(run, interpret=CHECKED), args)
    assert_close(actual, run(args, implementation="xla"))


def test_one_token_is_the_chain_of_ops():
    args = arguments(1)
    fused, chain = (gated_ssd(*args[:2], FORM, implementation=name)[0] for name in ("interpret", "xla"))
    np.testing.assert_array_equal(fused, chain)


@pytest.mark.parametrize("shape", [(2, 2, 1, 1), (2, 1, 2, 1)], ids=str)
def test_sharded_equals_unsharded(mesh, expected, shape):
    """Rows alone, and heads too."""
    with jax.set_mesh(mesh(*shape)):
        actual = outputs_and_gradients(arguments(), SEGMENTS, implementation="xla")
    assert_close(jax.tree.map(np.asarray, actual), expected[True])


def test_what_does_not_fit_is_named():
    inputs, weights, *_ = arguments(8)
    for wrong, message in [
        ((inputs._replace(z=inputs.z[..., 1:]), weights, FORM), r"z has shape .* expected that of x"),
        ((inputs, weights, Form(3)), "n_groups = 3 does not divide the 32 channels of B"),
        (
            (inputs, weights._replace(dt_bias=weights.A[1:]), FORM),
            r"dt_bias has shape \(3,\); expected \(4,\)",
        ),
        (
            (inputs._replace(dt=inputs.dt[..., :3]), weights, FORM),
            "32 channels, not a multiple of the 3 heads",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_ssd(*wrong)
    low = inputs._replace(x=inputs.x.astype(jnp.bfloat16))
    for wrong, message in [
        ((low, weights, FORM), "the projections differ in dtype: z float32, x bfloat16"),
        ((inputs, weights, Form(G, norm_before_gate=True)), "norm_before_gate=True; the kernels gate before"),
        ((inputs, weights, Form(G, chunk_size=6)), "chunk_size = 6 is not a multiple of"),
    ]:
        with pytest.raises(ValueError, match=message):
            gated_ssd(*wrong, implementation="interpret")


def test_one_row_of_one_group_is_left_to_the_chain_where_a_chip_has_two_cores():
    args = (*arguments(8, batch=1)[:2], None, None, None)
    for chip, groups, found in (("v5p", 1, True), ("v5p", 2, False), ("v5e", 1, False)):
        with tuning.chip(chip):
            assert (tpu.unwise(*args, Form(groups)) is not None) is found


def test_a_norm_that_does_not_fit_in_fast_memory_is_named():
    def of(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    x, heads = of(1, 256, 128 * 64), of(128)
    inputs = Inputs(z=x, x=x, B=of(1, 256, 128), C=of(1, 256, 128), dt=of(1, 256, 128))
    weights = Weights({"x": (of(4, 128 * 64), None)}, heads, heads, heads, of(128 * 64))
    found = {}

    def ask(inputs, weights):
        for interpret in (False, True):
            args = (inputs, weights, None, None, None, Form(1))
            found[interpret] = tpu.unsupported(*args, interpret=interpret)

    jax.eval_shape(ask, inputs, weights)
    assert re.match("a grid step of 128 heads needs [0-9]+ MiB of fast memory, more than 60", found[False])
    assert found[True] is None


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_moves_at_most_half_of_what_a_kernel_for_each_op_does():
    """A training step of 2.7B, 8192 tokens: 0.86 GB against 2.08, counted from the compiled programs."""
    fused, chain = (mamba2_bytes.op_bytes("v5e", op, True) for op in ("fused", "a kernel for each op"))
    assert 2 * fused < chain


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.parametrize(
    "chip, heads, groups, packed", [("v5e", 24, 1, False), ("v5p", 80, 1, True), ("v6e", 128, 8, False)]
)
def test_compiles_for_tpu(chip, heads, groups, packed):
    """Shapes of 130M, 2.7B and 8B."""
    length, shape = 1024, jax.ShapeDtypeStruct
    sizes = {"x": heads * 64, "B": groups * 128, "C": groups * 128}

    def low(*sizes):
        return shape(sizes, jnp.bfloat16)

    def wide(*sizes):
        return shape(sizes, jnp.float32)

    inputs = Inputs(
        z=low(1, length, sizes["x"]),
        **{name: low(1, length, size) for name, size in sizes.items()},
        dt=low(1, length, heads),
    )
    conv = {name: (wide(K, size), wide(size)) for name, size in sizes.items()}
    weights = Weights(conv, *[wide(heads)] * 3, wide(sizes["x"]))
    past = {name: low(1, K - 1, size) for name, size in sizes.items()}
    ids = shape((1, length), jnp.int32) if packed else None

    def run(inputs, weights, past, state, ids, dy):
        def op(inputs, weights, past, state):
            states = {"conv_state": past, "initial_state": state}
            y, *_ = gated_ssd(
                inputs, weights, Form(groups), **states, segment_ids=ids, implementation="pallas_tpu"
            )
            return y

        y, vjp = jax.vjp(op, inputs, weights, past, state)
        return y, vjp(dy)

    state = wide(1, heads, 64, 128)
    text = aot.compile_for(chip, run, inputs, weights, past, state, ids, inputs.x).as_text()
    assert "gated_ssd_forward" in text and "gated_ssd_backward" in text

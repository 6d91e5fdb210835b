"""A Mamba-2 layer's fused op: equal to the chain of ops, in values and in every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
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


@functools.partial(jax.jit, static_argnames=("form", "implementation", "interpret"))
def outputs_and_gradients(args, segment_ids=None, form=Form(G), implementation="interpret", interpret=None):
    """Everything that comes out, and the gradient of everything that goes in, with cotangents on all outputs."""

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


@pytest.mark.parametrize("packed, chunk", [(False, 16), (True, 8), (True, None)])
def test_fused_equals_the_reference(expected, packed, chunk):
    """Chunks shorter than the segments and longer; padding before, between, after; a row of padding."""
    form, ids = Form(G, chunk_size=chunk), SEGMENTS if packed else None
    with tuning.forced("ssd", {"chunk": 16, "heads": 1, "heads_backward": 2}):
        actual = outputs_and_gradients(arguments(), ids, form)
        again = outputs_and_gradients(arguments(), ids, form)
    assert_close(actual, expected[packed])
    jax.tree.map(np.testing.assert_array_equal, actual, again)

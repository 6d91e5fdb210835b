"""Causal convolution: values and every gradient against the moving window, in every mode."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d as conv_package
from pallas_kernels.causal_conv1d import causal_conv1d

# Segments shorter than K and of length 1; padding before (longer than a quarter of L), between and after;
# a row of padding; an id used again within reach of the taps.
SEGMENTS = np.zeros((4, 24), np.int32)
SEGMENTS[0, :10], SEGMENTS[0, 10:11], SEGMENTS[0, 11:22] = 1, 70000, 3
SEGMENTS[1, 11:17], SEGMENTS[1, 19:21] = 5, 7
SEGMENTS[3, 1:4], SEGMENTS[3, 4:5], SEGMENTS[3, 5:7], SEGMENTS[3, 9:] = 1, 2, 1, 4
SEGMENTS = jnp.asarray(SEGMENTS)


def inputs(length=24, width=4, batch=4, channels=6):
    rng = np.random.default_rng(0)
    shapes = {
        "x": (batch, length, channels),
        "weight": (width, channels),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def outputs_and_gradients(args, segment_ids=None, activation="silu", implementation="xla"):
    """y, final state and the gradient of every input, with cotangents on both outputs."""

    def run(args):
        y, state = causal_conv1d(
            **args, segment_ids=segment_ids, activation=activation, implementation=implementation
        )
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        weight_state = jnp.sin(jnp.arange(state.size, dtype=jnp.float32)).reshape(state.shape)
        return jnp.sum(weight * y) + jnp.sum(weight_state * state), (y, state)

    (_, outputs), gradients = jax.value_and_grad(run, has_aux=True)(args)
    return outputs, gradients


def assert_close(actual, expected, tolerance=2e-6):
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(
            a, e, rtol=0, atol=tolerance * (1 + np.abs(e).max(initial=0)), err_msg=jax.tree_util.keystr(path)
        )


@pytest.fixture(scope="module")
def expected():
    """The reference with and without segments."""
    return {
        packed: outputs_and_gradients(inputs(), SEGMENTS if packed else None, implementation="reference")
        for packed in (False, True)
    }


@pytest.mark.parametrize("packed", [False, True])
def test_equals_reference(expected, packed):
    assert_close(outputs_and_gradients(inputs(), SEGMENTS if packed else None), expected[packed])


@pytest.mark.parametrize(
    "length, width, activation", [(1, 4, "silu"), (2, 4, None), (24, 1, None), (5, 3, "silu")]
)
def test_equals_reference_at_any_length_and_width(length, width, activation):
    args, ids = inputs(length, width), SEGMENTS[:, :length]
    reference = outputs_and_gradients(args, ids, activation=activation, implementation="reference")
    assert_close(outputs_and_gradients(args, ids, activation=activation), reference)


def test_weight_gradient_over_several_blocks_of_time():
    args = inputs(length=300, batch=1)
    assert_close(outputs_and_gradients(args), outputs_and_gradients(args, implementation="reference"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cuts", [(2, 9), tuple(range(1, 24))])
def test_pieces_with_carried_state_equal_one_pass(expected, packed, cuts):
    """A piece continues the segment of the last real token, or starts from zero, as a mixer arranges it."""
    args = inputs()
    state, ys, segment = args["initial_state"], [], np.zeros(4, np.int32)
    step = jax.jit(functools.partial(causal_conv1d, activation="silu"))
    for start, stop in zip((0, *cuts), (*cuts, 24)):
        ids = SEGMENTS[:, start:stop] if packed else None
        if packed:
            real = np.asarray(ids) != 0
            first = np.take_along_axis(np.asarray(ids), real.argmax(1)[:, None], 1)[:, 0]
            continues = (segment == 0) | (first == 0) | (first == segment)
            state = jnp.where(jnp.asarray(continues)[:, None, None], state, 0)
            last = np.asarray(ids)[np.arange(4), real.shape[1] - 1 - real[:, ::-1].argmax(1)]
            segment = np.where(last == 0, segment, last)
        y, state = step(
            args["x"][:, start:stop], args["weight"], args["bias"], initial_state=state, segment_ids=ids
        )
        ys.append(y)
    assert_close((jnp.concatenate(ys, axis=1), state), expected[packed][0])


def test_left_padding_changes_nothing():
    """A prompt behind padding, with a state: outputs and state as if alone."""
    args = inputs(length=9, batch=1)
    y_alone, state_alone = causal_conv1d(**args)
    padded = args | {"x": jnp.pad(args["x"], ((0, 0), (15, 0), (0, 0)), constant_values=7.0)}
    y, state = causal_conv1d(
        **padded, segment_ids=jnp.repeat(jnp.array([[0, 1]]), jnp.array([15, 9]), axis=1)
    )
    np.testing.assert_array_equal(y[:, 15:], y_alone)
    np.testing.assert_array_equal(state, state_alone)


def test_padding_is_transparent(expected):
    (y, state), gradients = expected[True]
    padding = SEGMENTS[..., None] == 0
    assert not np.any(np.where(padding, y, 0)) and not np.any(np.where(padding, gradients["x"], 0))
    np.testing.assert_array_equal(state[2], inputs()["initial_state"][2])  # a row of padding only


def test_bfloat16_is_close_to_float32(expected):
    args = inputs()
    (y, state), gradients = outputs_and_gradients(args | {"x": args["x"].astype(jnp.bfloat16)}, SEGMENTS)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32  # the state keeps the dtype it came with
    assert_close(((y, state), gradients), expected[True], tolerance=1e-2)
    assert causal_conv1d(args["x"].astype(jnp.bfloat16), args["weight"])[1].dtype == jnp.bfloat16


def test_two_runs_are_equal_to_the_bit():
    first, second = outputs_and_gradients(inputs()), outputs_and_gradients(inputs())
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    "shape, packed", [((1, 1, 1, 4), False), ((1, 1, 1, 4), True), ((1, 1, 2, 2), True), ((2, 1, 2, 2), True)]
)
def test_sharded_equals_unsharded(mesh, expected, shape, packed):
    with jax.set_mesh(mesh(*shape)):
        actual = outputs_and_gradients(inputs(), SEGMENTS if packed else None)
    assert_close(jax.tree.map(np.asarray, actual), expected[packed])


def test_first_token_at_the_end_of_a_shard(mesh):
    """The incoming state then stands partly in the next shard's halo."""
    args = inputs()
    ids = jnp.asarray(np.arange(24) >= np.array([[5], [6], [4], [11]]), jnp.int32)
    reference = outputs_and_gradients(args, ids, implementation="reference")
    with jax.set_mesh(mesh(1, 1, 1, 4)):
        assert_close(jax.tree.map(np.asarray, outputs_and_gradients(args, ids)), reference)


def test_shards_shorter_than_the_taps_replicate_time(mesh):
    args = inputs(length=8)
    expected = outputs_and_gradients(args)
    with jax.set_mesh(mesh(1, 1, 1, 4)):
        assert_close(jax.tree.map(np.asarray, outputs_and_gradients(args)), expected)


def test_one_permute_over_sequence(mesh):
    with jax.set_mesh(mesh(1, 1, 1, 4)):
        spec = jax.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec(None, "sequence"))
        args = inputs()
        args["x"] = jax.device_put(args["x"], spec)
        run = jax.jit(lambda **args: causal_conv1d(**args, activation="silu")[0], out_shardings=spec)
        text = run.lower(**args).compile().as_text()
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert re.findall(rf" ({names})(?:-start)?\(", text) == ["collective-permute"]


def test_wrong_arguments_are_named():
    x, weight, bias, state = inputs(8).values()
    check = conv_package._check
    for wrong, message in [
        ((x[0], weight, bias, None, None, None), r"x has shape \(8, 6\)"),
        ((x, weight[:, :5], bias, None, None, None), r"weight has shape \(4, 5\); expected .*\('any', 6\)"),
        ((x, weight, bias[:5], None, None, None), "bias has shape"),
        ((x, weight, None, state[:, :2], None, None), r"initial_state has shape .*\(4, 3, 6\)"),
        ((x, weight, None, None, SEGMENTS, None), "segment_ids has shape"),
        ((x, weight, None, None, None, "gelu"), "activation is 'gelu'"),
        ((x[:, :0], weight, None, None, None, None), "at least one token"),
        ((x, weight[:0], None, None, None, None), "at least one tap"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(*wrong)
    with pytest.raises(ValueError, match="implementation='fast' does not exist"):
        causal_conv1d(x, weight, implementation="fast")
    with pytest.raises(ValueError, match="x has 2147483648 elements"):
        jax.eval_shape(causal_conv1d, jax.ShapeDtypeStruct((1, 2**25, 64), jnp.float32), jnp.zeros((4, 64)))

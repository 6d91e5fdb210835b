"""SSD: values and every gradient against the recurrence, in every mode."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ssd as ssd_package
from pallas_kernels.segments import reset_runs
from pallas_kernels.ssd import ssd, ssd_core

# Segments of length 1, crossing chunk edges; padding before, between, after; a row of padding; a reused id.
SEGMENTS = np.zeros((4, 48), np.int32)
SEGMENTS[0, :20], SEGMENTS[0, 20:21], SEGMENTS[0, 21:] = 1, 2, 70000
SEGMENTS[1, 30:35], SEGMENTS[1, 37:46] = 5, 7
SEGMENTS[3, 3:9], SEGMENTS[3, 9:10], SEGMENTS[3, 10:12], SEGMENTS[3, 14:] = 1, 2, 1, 4
SEGMENTS = jnp.asarray(SEGMENTS)


def inputs(length=48, batch=4, heads=4, headdim=8, groups=2, d_state=16):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "x": normal(batch, length, heads, headdim),
        "dt": np.logaddexp(normal(batch, length, heads) - 1, 0),
        "A": -np.exp(normal(heads)),
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(heads),
        "initial_state": normal(batch, heads, headdim, d_state),
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


@functools.partial(jax.jit, static_argnames=("chunk_size", "implementation"))
def outputs_and_gradients(args, segment_ids=None, chunk_size=16, implementation="xla"):
    """y, final state and the gradient of every input, with cotangents on both outputs."""

    def run(args):
        y, state = ssd(**args, segment_ids=segment_ids, chunk_size=chunk_size, implementation=implementation)
        weight = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
        weight_state = jnp.sin(jnp.arange(state.size, dtype=jnp.float32)).reshape(state.shape)
        return jnp.sum(weight * y) + jnp.sum(weight_state * state), (y, state)

    (_, outputs), gradients = jax.value_and_grad(run, has_aux=True)(args)
    return outputs, gradients


def assert_close(actual, expected, tolerance=2e-5):
    """Every leaf, relative to its largest entry."""
    for (path, a), e in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        error = np.abs(a - e).max() / (np.abs(e).max() + 1e-9)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.fixture(scope="module")
def expected():
    """The reference with and without segments."""
    return {
        packed: outputs_and_gradients(inputs(), SEGMENTS if packed else None, implementation="reference")
        for packed in (False, True)
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_size", [5, 16, 64])
def test_equals_reference_at_any_chunk_size(expected, packed, chunk_size):
    actual = outputs_and_gradients(inputs(), SEGMENTS if packed else None, chunk_size=chunk_size)
    assert_close(actual, expected[packed])


@pytest.mark.parametrize("length", [1, 19])
def test_equals_reference_at_any_length(length):
    args, segment_ids = inputs(length), SEGMENTS[:, :length]
    reference = outputs_and_gradients(args, segment_ids, implementation="reference")
    assert_close(outputs_and_gradients(args, segment_ids), reference)


@pytest.mark.parametrize("cuts", [(7, 31), tuple(range(1, 48))])
def test_pieces_with_carried_state_equal_one_pass(expected, cuts):
    args = inputs()
    step = jax.jit(functools.partial(ssd, chunk_size=16))
    state, ys = args.pop("initial_state"), []
    fixed = {name: args.pop(name) for name in ("A", "D")}
    for start, stop in zip((0, *cuts), (*cuts, 48)):
        piece = {name: value[:, start:stop] for name, value in args.items()}
        y, state = step(**piece, **fixed, initial_state=state)
        ys.append(y)
    assert_close((jnp.concatenate(ys, axis=1), state), expected[False][0])


def test_gradient_of_two_chained_pieces_is_the_gradient_of_the_whole():
    args = inputs(32)

    def loss(args, cuts):
        state, total = args["initial_state"], 0.0
        for start, stop in cuts:
            piece = {name: args[name][:, start:stop] for name in ("x", "dt", "B", "C")}
            y, state = ssd(**piece, A=args["A"], D=args["D"], initial_state=state, chunk_size=16)
            total += jnp.sum(jnp.sin(y))
        return total + jnp.sum(jnp.cos(state))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    assert_close(gradient(args, ((0, 16), (16, 32))), gradient(args, ((0, 32),)))


def test_packed_documents_equal_separate_runs():
    args = inputs(batch=1)
    bounds = [(0, 20), (20, 21), (21, 48)]
    ids = jnp.asarray(np.repeat([1, 2, 3], [20, 1, 27])[None], jnp.int32)
    y, state = ssd(**args, segment_ids=ids, chunk_size=16)
    state_in = args.pop("initial_state")
    fixed = {name: args.pop(name) for name in ("A", "D")}
    for start, stop in bounds:
        piece = {name: value[:, start:stop] for name, value in args.items()}
        y_alone, state_alone = ssd(**piece, **fixed, initial_state=state_in, chunk_size=16)
        state_in = None
        assert_close(y[:, start:stop], y_alone)
    assert_close(state, state_alone)


def test_padding_is_transparent(expected):
    (y, state), gradients = expected[True]
    assert not np.any(np.where(SEGMENTS[..., None, None] == 0, y, 0))
    np.testing.assert_array_equal(state[2], inputs()["initial_state"][2])  # a row of padding only
    for name in ("x", "dt", "B", "C"):
        padded = SEGMENTS.reshape(4, 48, *[1] * (gradients[name].ndim - 2)) == 0
        assert not np.any(np.where(padded, gradients[name], 0)), name
    np.testing.assert_array_equal(reset_runs(SEGMENTS)[3, [0, 3, 9, 10, 12, 14]], [0, 0, 1, 2, 2, 3])


def test_bfloat16_is_close_to_float32(expected):
    args = inputs()
    low = {name: args[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    (y, state), gradients = outputs_and_gradients(args | low)
    assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_close(((y, state), gradients), expected[False], tolerance=3e-2)


@pytest.mark.parametrize("size", [13.0, 1e4, 1e30])
def test_extreme_decay_is_finite_and_right(size):
    """dt * A sums to -200 in each chunk of 16, and to far less; some tokens keep a mild decay."""
    args = inputs() | {"dt": inputs()["dt"].at[:, ::2].set(size), "A": -jnp.ones(4)}
    args["x"] = args["x"] / args["dt"][..., None]
    (y, state), gradients = outputs_and_gradients(args)
    (y_expected, state_expected), _ = outputs_and_gradients(args, implementation="reference")
    assert_close((y, state), (y_expected, state_expected), tolerance=1e-4)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_two_runs_are_equal_to_the_bit():
    first, second = outputs_and_gradients(inputs()), outputs_and_gradients(inputs())
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_pieces_equal_whole_at_128k_tokens():
    length, piece = 2**17, 2**15
    args = inputs(length, batch=1, heads=1, headdim=2, groups=1, d_state=2)
    u, log_decay, B, C = args["x"], -args["dt"] / 50, args["B"], args["C"]
    run = jax.jit(functools.partial(ssd_core, chunk_size=64))
    y, final = run(u, log_decay, B, C)
    state, ys = None, []
    for start in range(0, length, piece):
        part = (t[:, start : start + piece] for t in (u, log_decay, B, C))
        y_piece, state = run(*part, initial_state=state)
        ys.append(y_piece)
    assert_close((jnp.concatenate(ys, axis=1), state), (y, final))


@pytest.mark.parametrize(
    "shape, packed", [((1, 1, 1, 4), False), ((1, 1, 1, 4), True), ((1, 1, 2, 2), True), ((2, 1, 2, 2), True)]
)
def test_sharded_equals_unsharded(mesh, expected, shape, packed):
    with jax.set_mesh(mesh(*shape)):
        actual = outputs_and_gradients(inputs(), SEGMENTS if packed else None)
    assert_close(jax.tree.map(np.asarray, actual), expected[packed])


def test_one_group_over_two_tensor_devices(mesh):
    args = inputs(groups=1)
    expected = outputs_and_gradients(args)
    with jax.set_mesh(mesh(1, 1, 2, 1)):
        assert_close(jax.tree.map(np.asarray, outputs_and_gradients(args)), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_one_all_gather_over_sequence(mesh, packed):
    spec = jax.sharding.PartitionSpec(None, "sequence")
    with jax.set_mesh(mesh(1, 1, 1, 4)):
        args = inputs()
        sharding = {n: jax.NamedSharding(jax.sharding.get_mesh(), spec) for n in ("x", "dt", "B", "C")}
        args |= {name: jax.device_put(args[name], sharding[name]) for name in sharding}
        ids = jax.device_put(SEGMENTS, sharding["x"]) if packed else None
        run = jax.jit(functools.partial(ssd, chunk_size=16), out_shardings=(sharding["x"], None))
        text = run.lower(**args, segment_ids=ids).compile().as_text()
    assert collectives(text) == ["all-gather"]


def collectives(hlo: str) -> list[str]:
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf" ({names})(?:-start)?\(", hlo)


def test_groups_that_do_not_split_over_the_tensor_axis_are_refused(mesh):
    args = inputs(heads=12, groups=3)
    with jax.set_mesh(mesh(1, 1, 4, 1)), pytest.raises(ValueError, match="n_groups.*tensor axis of 4"):
        jax.eval_shape(ssd, **args)


def test_wrong_shapes_are_named():
    args = inputs(8)
    u, dt, B, C, state = (args[name] for name in ("x", "dt", "B", "C", "initial_state"))
    check = ssd_package._check_core
    for wrong, message in [
        ((u[0], dt, B, C, None, None), r"u \(dt \* x\) has shape \(8, 4, 8\)"),
        ((u, dt[:, :7], B, C, None, None), r"log_decay .* has shape \(4, 7, 4\); expected .*\(4, 8, 4\)"),
        ((u, dt, B, C[..., :3], None, None), r"C has shape .*expected the shape of B"),
        ((u[:, :, :3], dt[..., :3], B, C, None, None), "2 groups for 3 heads"),
        ((u, dt, B, C, state[:, :1], None), "initial_state has shape"),
        ((u, dt, B, C, None, SEGMENTS), "segment_ids has shape"),
        ((u[:, :0], dt[:, :0], B, C, None, None), "at least one token"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(*wrong)
    with pytest.raises(ValueError, match="implementation='fast' does not exist"):
        ssd(**args, implementation="fast")
    with pytest.raises(ValueError, match="chunk_size is 0"):
        ssd(**args, chunk_size=0)


def test_sizes_of_2_to_the_31_elements_are_refused():
    shape = jax.ShapeDtypeStruct
    u, a, B = shape((1, 2**20, 32, 64), jnp.float32), shape((1, 2**20, 32), jnp.float32), (1, 2**20, 1, 16)
    B = shape(B, jnp.float32)
    with pytest.raises(ValueError, match=r"u would have 2147483648 elements"):
        jax.eval_shape(ssd_core, u, a, B, B)

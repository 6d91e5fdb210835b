"""The SSD kernels for TPU: equal to the recurrence, free of races, and taken where they should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.segments import reset_runs
from pallas_kernels.ssd import ssd, ssd_core, tpu
from tests.races import CHECKED, assert_no_races
from tests.units.test_ssd import SEGMENTS, assert_close, expected, inputs, outputs_and_gradients  # noqa: F401


@functools.cache
def compiled(chunk_size, heads, heads_backward):
    def run(args, segment_ids):
        with tuning.forced("ssd", {"heads": heads, "heads_backward": heads_backward}):
            return outputs_and_gradients.__wrapped__(args, segment_ids, chunk_size, "interpret")

    return jax.jit(run)


def interpreted(args, segment_ids=None, chunk_size=16, heads=2, heads_backward=1):
    """Outputs and gradients with these sizes; 2 heads are all of a group's."""
    return compiled(chunk_size, heads, heads_backward)(args, segment_ids)


@pytest.mark.parametrize(
    "packed, chunk_size, heads, heads_backward",
    [(False, 16, 2, 1), (True, 16, 2, 1), (True, 5, 1, 2)],  # 5: a ragged last chunk
)
def test_equals_reference(expected, packed, chunk_size, heads, heads_backward):  # noqa: F811
    actual = interpreted(inputs(), SEGMENTS if packed else None, chunk_size, heads, heads_backward)
    assert_close(actual, expected[packed], tolerance=5e-6)


def test_two_runs_are_equal_to_the_bit():
    first, second = (interpreted(inputs(), SEGMENTS) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("length", [1, 3])
def test_few_tokens_and_channels_that_fill_no_tile(length):
    """The row before last of the segments is padding only."""
    args, ids = inputs(length, headdim=3, groups=1, d_state=5), SEGMENTS[:, 2 : 2 + length]
    reference = outputs_and_gradients(args, ids, implementation="reference")
    assert_close(interpreted(args, ids, chunk_size=2, heads=4), reference, tolerance=5e-6)


def test_input_and_decay_apart():
    args = inputs(11, batch=1, groups=4)
    parts = (args["x"], -args["dt"], args["B"], args["C"])

    @functools.partial(jax.jit, static_argnums=1)
    def run(parts, implementation):
        def loss(parts):
            y, state = ssd_core(*parts, chunk_size=8, implementation=implementation)
            return jnp.sum(jnp.sin(y)) + jnp.sum(state**2), (y, state)

        return jax.value_and_grad(loss, has_aux=True)(parts)

    assert_close(run(parts, "interpret"), run(parts, "reference"), tolerance=5e-6)


def test_strong_decay():
    """dt * A sums to -200 in each chunk of 16, to far less in some heads; some tokens keep a mild decay."""
    args = inputs() | {"dt": inputs()["dt"].at[:, ::2].set(25.0), "A": -jnp.asarray([1.0, 1.0, 1e3, 1e30])}
    args["x"] = args["x"] / args["dt"][..., None]
    outputs, gradients = interpreted(args)
    wanted, wanted_gradients = outputs_and_gradients(args, implementation="reference")
    assert_close(outputs, wanted, tolerance=1e-4)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    mild = {name: gradients[name][:, :, :2] for name in ("x", "dt")}
    assert_close(mild, {name: wanted_gradients[name][:, :, :2] for name in mild}, tolerance=1e-3)


def test_bfloat16_operands(expected):  # noqa: F811
    """Within 3 % of float32."""
    low = {name: inputs()[name].astype(jnp.bfloat16) for name in ("x", "B", "C")}
    actual = interpreted(inputs() | low, SEGMENTS)
    assert actual[0][0].dtype == jnp.bfloat16 and actual[0][1].dtype == jnp.float32
    assert_close(actual, expected[True], tolerance=3e-2)


def test_no_race_and_no_read_of_unwritten_memory():
    args = inputs(20, batch=1)
    ids = SEGMENTS[3:, :20]

    def run(x, B, state):
        with tuning.forced("ssd", {"heads": 1, "heads_backward": 1}):
            y, final = tpu.ssd(
                x,
                args["dt"],
                -args["dt"],
                B,
                args["C"],
                args["D"],
                state,
                reset_runs(ids),
                8,
                interpret=CHECKED,
            )
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(final))

    gradient = jax.jit(jax.grad(run, argnums=(0, 1, 2)))
    results = assert_no_races(gradient, args["x"], args["B"], args["initial_state"])
    assert all(np.isfinite(g).all() for g in results)


def test_sharded_equals_unsharded(mesh, expected):  # noqa: F811
    with jax.set_mesh(mesh(1, 1, 2, 2)):
        actual = interpreted(inputs(), SEGMENTS)
    assert_close(jax.tree.map(np.asarray, actual), expected[True])


def test_pieces_equal_whole_at_256k_tokens():
    length, piece = 2**18, 2**16
    args = inputs(length, batch=1, heads=1, headdim=8, groups=1, d_state=4)
    parts = (args["x"], -args["dt"] / 50, args["B"], args["C"])
    run = jax.jit(functools.partial(ssd_core, chunk_size=512, implementation="interpret"))
    whole = run(*parts)
    state, ys = None, []
    for start in range(0, length, piece):
        y, state = run(*(t[:, start : start + piece] for t in parts), initial_state=state)
        ys.append(y)
    assert_close((jnp.concatenate(ys, axis=1), state), whole)


def test_runs_by_itself_where_the_program_is_for_tpu():
    args = jax.eval_shape(inputs)
    run = jax.jit(
        jax.grad(lambda args, chunk_size=None: ssd(**args, chunk_size=chunk_size)[0].sum()), static_argnums=1
    )
    for platform, chunk_size, taken in [("tpu", None, True), ("cpu", None, False), ("tpu", 40, False)]:
        text = run.trace(args, chunk_size).lower(lowering_platforms=(platform,)).as_text()
        assert ("ssd_backward" in text) == taken, (platform, chunk_size)


def test_what_is_unsupported_is_told():
    args = inputs(300)
    with pytest.raises(ValueError, match="chunk_size = 64 is not a multiple of 128 lanes; use 128 or None"):
        ssd(**args, chunk_size=64, implementation="pallas_tpu")
    wide = jax.eval_shape(functools.partial(inputs, 300, headdim=4096, d_state=512))
    with pytest.raises(ValueError, match="a head of P = 4096 channels and N = 512 states fills fast memory"):
        jax.eval_shape(functools.partial(ssd, implementation="pallas_tpu"), **wide)
    with pytest.raises(ValueError, match="B is float16, and the kernels take float32 or bfloat16"):
        ssd(**args | {"B": args["B"].astype(jnp.float16)}, implementation="interpret")
    parts = (args[name] for name in ("x", "dt", "B", "C"))
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="the state is float64.*give dt and A in float32"),
    ):
        ssd_core(*(t.astype(jnp.float64) if t.ndim == 3 else t for t in parts), implementation="interpret")


def test_operands_of_two_dtypes_are_promoted():
    args = inputs(8)
    low = args | {"x": args["x"].astype(jnp.bfloat16)}
    y, state = ssd(**low, implementation="interpret")
    assert y.dtype == jnp.bfloat16
    assert_close((y, state), ssd(**low, implementation="reference"), tolerance=5e-3)

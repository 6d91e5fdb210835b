"""The linear recurrence's TPU kernels: equal to the reference, free of races, and they compile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import recurrence_cases
from pallas_kernels import tuning
from pallas_kernels.lti_ssm import lti_ssm, reference, tpu
from pallas_kernels.lti_ssm.tpu_plan import Factors, Resets, make_plan
from runtime import aot
from tests.races import CHECKED, assert_no_races
from tests.units.test_lti_ssm import SEGMENTS, assert_close, expected, inputs, outputs_and_gradients

IDS = jnp.asarray(SEGMENTS)


def interpreted(args, segment_ids=None, reverse=False, **blocks):
    """Traced anew, with these blocks."""
    with tuning.forced("lti_ssm", blocks):
        run = functools.partial(outputs_and_gradients.__wrapped__, implementation="interpret")
        return jax.jit(lambda args, ids: run(args, "diagonal", ids, reverse))(args, segment_ids)


@pytest.mark.parametrize(
    "packed, reverse, chunk, rows, heads",
    [
        (False, False, 8, 512, 4),  # 44 tokens: a ragged chunk
        (True, False, 24, 4, 2),  # one chunk of four rows a block; several resets in a chunk
        (True, True, 8, 12, 2),
    ],
)
def test_equals_reference(packed, reverse, chunk, rows, heads):
    actual = interpreted(
        inputs("diagonal"), IDS if packed else None, reverse, chunk=chunk, rows=rows, heads=heads
    )
    assert_close(actual, expected("diagonal", packed, reverse), tolerance=4e-6)


@pytest.fixture(scope="module")
def short():
    """33 tokens; blocks of two chunks of eight, one of which only fills up the last block. Modes that grow,
    and that decay by exp(-200) in a chunk and more."""
    args = inputs("diagonal", length=33, batch=2, heads=2)
    real = jnp.asarray([[0.3, -25.0, -1e3], [-0.1, -40.0, -1.0]])
    args["log_A"] = jax.lax.complex(real, args["log_A"].imag)
    return args, outputs_and_gradients(args, "diagonal", implementation="reference")


def test_strong_decay_and_growth_over_ragged_blocks(short):
    args, wanted = short
    actual, again = (interpreted(args, chunk=8, rows=4, heads=1) for _ in range(2))
    assert_close(actual, wanted, tolerance=4e-6)
    jax.tree.map(np.testing.assert_array_equal, actual, again)


@pytest.mark.parametrize("length", [1, 3])
def test_equals_reference_at_few_tokens(length):
    args, ids = inputs("diagonal", length), IDS[:, 9 : 9 + length]
    wanted = outputs_and_gradients(args, "diagonal", ids, implementation="reference")
    assert_close(interpreted(args, ids), wanted, tolerance=4e-6)


def test_what_comes_later_is_never_seen():
    args = inputs("diagonal")
    run = jax.jit(lambda args: lti_ssm(**args, segment_ids=IDS, implementation="interpret")[0])
    y = run(args)
    args["u"] = args["u"].at[:, 11].add(1e3)
    np.testing.assert_array_equal(run(args)[:, :11], y[:, :11])


def test_no_races(short):
    """Values too: memory that nobody wrote is NaN there."""
    args, _ = short
    ids = IDS[::3, :33]
    real = (ids != 0)[..., None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(interpret, *inputs):
        def op(u, *rest):
            chosen = reference.lti_ssm
            if interpret is not None:
                chosen = functools.partial(tpu.lti_ssm, interpret=interpret)
            y, state = chosen(jnp.where(real, u, 0), *rest, ids)
            return jnp.where(real, y, 0), state

        outputs, vjp = jax.vjp(op, *inputs)
        weights = jax.tree.map(lambda t: jnp.cos(jnp.arange(t.size, dtype=t.dtype)).reshape(t.shape), outputs)
        return outputs, vjp(weights)

    with tuning.forced("lti_ssm", {"chunk": 8, "rows": 4, "heads": 1}):
        actual = assert_no_races(functools.partial(run, CHECKED), *args.values())
    assert_close(actual, run(None, *args.values()), tolerance=4e-6)


def test_what_it_does_not_take_is_named():
    many = inputs("diagonal", length=2, d_state=600)
    with pytest.raises(ValueError, match="N = 600 states are above 512, what fast memory holds; lower N. Or"):
        lti_ssm(**many, implementation="interpret")
    u, log_A = jax.ShapeDtypeStruct((3000, 2, 1), jnp.float32), jax.ShapeDtypeStruct((1, 8), jnp.complex64)
    reason = tpu.unsupported(u, log_A, log_A, log_A, log_A, None)
    assert reason is not None and "3000 rows of 8 states are above 65536 states in all" in reason
    with jax.enable_x64(True):
        wide = {
            name: t.astype(f"{t.dtype.kind}{2 * t.dtype.itemsize}") for name, t in inputs("diagonal").items()
        }
        with pytest.raises(ValueError, match="u is float64, and TPU kernels compute in float32; cast it"):
            lti_ssm(**wide, implementation="interpret")


needs_compiler = pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))


@pytest.mark.aot
@needs_compiler
@pytest.mark.parametrize(
    "chip, batch, heads, packed",
    [("v5e", 16, 256, True), ("v5p", 1, 1024, False), ("v6e", 3, 512, True)],
)
def test_kernels_compile_for_tpu(chip, batch, heads, packed):
    """Without the exponentials around them, which take XLA far longer to compile."""
    plan = make_plan((batch, 4096, heads), 64, packed, interpret=False)

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, state = plan.all_chunks * batch, of(heads, batch, plan.d_state)
    arrays = {"u": of(heads, rows, plan.chunk), "kernel": of(heads, 1, plan.chunk), "state": state}
    arrays["factors"] = of(heads, Factors.count(plan.tiles), plan.d_state)
    marks = None
    if packed:
        arrays["tail"] = of(heads, batch, plan.chunk)
        shapes = (rows, plan.chunk), (rows, plan.d_state), (plan.time_blocks,)
        marks = Resets(*(of(*shape, dtype=jnp.int32) for shape in shapes))

    def run(arrays, jumps, stops, marks, cotangents):
        outputs, vjp = jax.vjp(lambda arrays: tpu.scan(plan, arrays, jumps, stops, marks), arrays)
        return outputs, vjp(cotangents)

    jumps, stops = of(heads, plan.jumps, plan.d_state), of(batch, dtype=jnp.int32)
    cotangents = arrays["u"], state, state if packed else None
    text = aot.compile_for(chip, run, arrays, jumps, stops, marks, cotangents).as_text()
    assert "lti_ssm_backward" in text


@pytest.mark.aot
@needs_compiler
def test_is_what_tpu_gets():
    function, args = recurrence_cases.lti_ssm(3, 1000, 6, 4, packed=True, backward=True)
    assert "lti_ssm_backward" in aot.compile_for("v6e", function, *args).as_text()

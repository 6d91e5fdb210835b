"""SSD against vectors of the Mamba-2 authors' reference functions (see the file's ``__meta__``)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ssd import ssd
from tests.conftest import GOLDEN

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


@pytest.fixture(params=sorted(TOLERANCE))
def golden(request):
    """The vectors in one precision, a jitted ssd, and a comparison."""
    with np.load(GOLDEN / "ssd.npz") as file:
        vectors = {name: file[name] for name in file.files if name != "__meta__"}
    with jax.enable_x64(request.param == "float64"):
        cast = {
            n: jnp.asarray(v, request.param if v.dtype == np.float64 else None) for n, v in vectors.items()
        }

        def close(actual, name):
            assert actual.dtype == request.param
            np.testing.assert_allclose(actual, vectors[name], rtol=0, atol=TOLERANCE[request.param])

        yield cast, jax.jit(ssd, static_argnames=("chunk_size", "implementation")), close


@pytest.mark.parametrize("how", [{"chunk_size": 8}, {"chunk_size": 12}, {"implementation": "reference"}])
def test_values_and_states(golden, how):
    v, run, close = golden
    run = functools.partial(run, **how)
    parts = (v["x"], v["dt"], v["A"], v["B"], v["C"])

    y, state = run(*parts, initial_state=v["h0"])
    close(y, "y_h0")
    close(state, "final_state_h0")
    y, state = run(*parts)
    close(y, "y_zero")
    close(state, "final_state_zero")
    y, _ = run(*parts, v["D"])
    close(y, "y_D")
    close(y * jax.nn.silu(v["z"]), "y_D_z")
    clamped = jnp.clip(v["dt"], *v["dt_limit"])
    y, state = run(v["x"], clamped, *parts[2:], initial_state=v["h0"])
    close(y, "y_h0_clamped")
    close(state, "final_state_h0_clamped")


def test_packed_documents(golden):
    v, run, close = golden
    y, state = run(
        v["x"], v["dt"], v["A"], v["B"], v["C"], v["D"], segment_ids=v["seq_idx"] + 1, chunk_size=8
    )
    close(y, "y_packed_D")
    np.testing.assert_allclose(state, v["varlen_states"][-1], atol=TOLERANCE[str(state.dtype)])


def test_decoding(golden):
    v, run, close = golden
    state, ys = v["h0"], []
    for t in range(v["y_decode_D"].shape[1]):
        x, dt, B, C = (v[name][:, t : t + 1] for name in ("x", "dt", "B", "C"))
        y, state = run(x, dt, v["A"], B, C, v["D"], initial_state=state)
        ys.append(y)
    close(jnp.concatenate(ys, axis=1), "y_decode_D")
    close(state, "state_after_decode")

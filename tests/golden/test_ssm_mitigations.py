"""Mitigations against vectors of the authors' functions, or of the published formulae (see ``__meta__``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import longmamba
from layers.decimation import DecimateConfig, importance, kept_places
from layers.polarised import polarised
from layers.prefix_scan import prefix_ssd
from layers.state_limits import capped_ssd, windowed_ssd
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd_core
from tests.conftest import GOLDEN

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


@pytest.fixture(params=sorted(TOLERANCE), scope="module")
def golden(request):
    """The vectors in one precision, and a comparison."""
    with np.load(GOLDEN / "ssm_mitigations.npz") as file:
        vectors = {name: file[name] for name in file.files if name != "__meta__"}
    with jax.enable_x64(request.param == "float64"):
        v = {n: jnp.asarray(a, request.param) if a.dtype.kind == "f" else a for n, a in vectors.items()}

        def close(actual, name):
            assert actual.dtype == request.param
            np.testing.assert_allclose(actual, vectors[name], rtol=0, atol=TOLERANCE[request.param])

        yield v, close


def time_second(t):
    return jnp.moveaxis(t, -1, 1)


def test_decimation(golden):
    v, _ = golden
    length, tail = v["deci_delta_raw"].shape[2], int(v["deci_response_len"])
    dt = time_second(jax.nn.softplus(v["deci_delta_raw"] + v["deci_delta_bias"][:, None]))
    for case in range(4):
        layer, base, beta, first, count, least = map(float, v[f"deci_case{case}_cfg"])
        layers = tuple(range(int(first), int(first + count)))
        config = DecimateConfig(layers=layers, base=int(base), beta=beta, minimum=int(least), tail=tail)
        kept = np.arange(length)
        if int(layer) in layers:
            keep = config.keep(layers.index(int(layer)), length - tail)
            kept = kept_places(importance(dt), keep, tail)[0]
        np.testing.assert_array_equal(kept, v[f"deci_case{case}_idx"])


def test_longmamba(golden):
    v, close = golden
    share, length = float(v["lm_cal_clampfrac"]), int(v["lm_cal_target_len"])

    @jax.jit
    def run(delta, threshold, alpha, target):
        dt = time_second(delta)
        changed = {
            "filtered": longmamba.filter_by_threshold(dt, threshold),
            "by_share": longmamba.filter_by_share(dt, alpha),
            "scaled": longmamba.scale_to_sum(dt, target),
        }
        calibrated = longmamba.calibrate(dt, length, share)
        return {k: jnp.moveaxis(t, 1, -1) for k, t in changed.items()}, [t[0] for t in calibrated]

    changed, (total, kept, threshold) = run(
        *(v[f"lm_{k}"] for k in ("delta", "dt_thre", "alpha", "decay_target"))
    )
    close(changed["filtered"], "lm_delta_filtered")
    np.testing.assert_array_equal(changed["filtered"] > 0, v["lm_mask_dt_thre"])
    np.testing.assert_array_equal(changed["by_share"] > 0, v["lm_mask_topalpha"])
    close(changed["scaled"], "lm_delta_normalized")
    close(total, "lm_cal_dt_sum")
    np.testing.assert_allclose(kept, v["lm_cal_alpha"], rtol=1e-6)
    close(threshold, "lm_cal_dt_thre")


@pytest.fixture(scope="module")
def stuffed(golden):
    """u, log decay, B, C with a batch axis, and D x."""
    v, _ = golden
    u, decay = v["sm_dt"][..., None] * v["sm_x"], v["sm_dt"] * v["sm_A"]
    parts = tuple(t[None] for t in (u, decay, v["sm_B"][:, None], v["sm_C"][:, None]))
    return parts, v["sm_D"][:, None] * v["sm_x"]


def test_forget_more_remember_less(golden, stuffed):
    _, close = golden
    (u, decay, B, C), skip = stuffed
    run = jax.jit(lambda u, decay: ssd_core(u, decay, B, C, chunk_size=16)[0][0] + skip)
    close(run(u, decay), "sm_y_plain")
    close(run(0.75 * u, decay + np.log(0.9999)), "sm_y_rri")


def test_window(golden, stuffed):
    v, close = golden
    parts, skip = stuffed
    window, length = int(v["sm_window"]), len(skip)
    stops = jnp.asarray([1, window, window + 1, length])
    ids = (jnp.arange(length) < stops[:, None]).astype(jnp.int32)
    rows = (jnp.repeat(t, len(stops), axis=0) for t in parts)
    run = jax.jit(lambda *parts: windowed_ssd(*parts, window, segment_ids=ids, chunk_size=16))
    y, state, carried = run(*rows)
    close(y[-1] + skip, "sm_y_window")
    gone = jnp.exp(carried["recent"]["log_decay"].sum(axis=1))[..., None, None] * carried["behind"]
    close(state - gone, "sm_state_window")


def test_state_norm(golden, stuffed):
    v, close = golden
    parts, skip = stuffed
    close(capped_ssd(*parts, v["sm_norm_cap"])[0][0] + skip, "sm_y_statenorm")


def test_polarised_channels(golden):
    v, close = golden
    u, delta, z, B, C = (time_second(v[f"po_{name}"]) for name in ("u", "delta", "z", "B", "C"))
    A = polarised(v["po_A_reg"], 1, 1)
    close(A, "po_A_full")
    dt = jax.nn.softplus(delta + v["po_delta_bias"])
    y, state = jax.jit(selective_scan)(u, dt, A, B, C, v["po_D"])
    close(jnp.moveaxis(y * jax.nn.silu(z), 1, -1), "po_y")
    close(state, "po_last_state")


def test_prefix_read_both_ways(golden):
    v, close = golden
    f, x = v["bi_f"], v["bi_x"]
    one = jnp.ones((1, len(x), 1, 1), x.dtype)
    ids = jnp.cumsum(jnp.asarray(v["bi_reset_fwd"]))[None]
    prefix = jnp.asarray(v["bi_causal_region"])[None] == 0
    run = jax.jit(lambda u, decay: prefix_ssd(u, decay, one, one, prefix, segment_ids=ids)[0])
    close(run(x[None, ..., None], jnp.log(f)[None])[0, ..., 0], "bi_h")

"""The arithmetic of the GPU kernels, block by block in numpy, against the references. No GPU has run them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, linear_scan, selective_scan, ssd
from pallas_kernels.causal_conv1d import gpu as conv_gpu
from pallas_kernels.linear_scan import gpu as linear_gpu
from pallas_kernels.segments import reset_runs
from pallas_kernels.selective_scan import gpu as selective_gpu
from pallas_kernels.selective_scan import gpu_kernels
from pallas_kernels.ssd import gpu as ssd_gpu
from pallas_kernels.ssd import gpu_backward, gpu_chunk, gpu_forward
from tests.gpu_emulator import Emulator

# Segments of length 1, shorter than K, over edges of tiles and chunks; padding before, between, after, only.
SEGMENTS = np.zeros((4, 130), np.int32)
SEGMENTS[0, :60], SEGMENTS[0, 60:61], SEGMENTS[0, 61:] = 1, 2, 70000
SEGMENTS[1, 30:35], SEGMENTS[1, 37:66] = 5, 7
SEGMENTS[3, 3:9], SEGMENTS[3, 9:10], SEGMENTS[3, 10:12], SEGMENTS[3, 14:128] = 1, 2, 1, 4


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    Emulator(monkeypatch, conv_gpu, linear_gpu, gpu_kernels, gpu_chunk, gpu_forward, gpu_backward)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def assert_equal(run, reference, args, cotangents, tolerance=2e-5):
    """Outputs and every gradient, each relative to its largest entry."""
    outputs, pull = jax.vjp(run, *args)

    @jax.jit
    def expect(args, cotangents):
        outputs, pull = jax.vjp(reference, *args)
        return *outputs, *pull(jax.tree.map(lambda c, y: c.astype(y.dtype), cotangents, outputs))

    expected = expect(args, cotangents)
    for place, (a, e) in enumerate(zip((*outputs, *pull(cotangents)), expected, strict=True)):
        a, e = (np.asarray(t).astype(np.result_type(t, np.float64)) for t in (a, e))
        assert a.shape == e.shape
        error = np.abs(a - e).max(initial=0) / (np.abs(e).max(initial=0) + 1e-9)
        assert error <= tolerance, f"{place}: {error}"


@pytest.mark.parametrize(
    "length, constant, is_complex, reverse",
    [(40, False, True, True), (40, True, False, False), (1, False, False, True)],
)
def test_linear_scan(length, constant, is_complex, reverse):
    def number(*shape):
        return normal(*shape) + 1j * normal(*shape[::-1]).T if is_complex else normal(*shape)

    shape = (2, length, 3)
    args = (number(3) if constant else number(*shape)) * 0.5, number(*shape), number(2, 3)
    assert_equal(
        lambda *args: linear_gpu.linear_scan(*args, reverse),
        lambda *args: linear_scan.IMPLEMENTATIONS["reference"](*args, reverse),
        args,
        (number(*shape), number(2, 3)),
    )


@pytest.mark.parametrize(
    "length, width, packed", [(40, 4, True), (19, 4, False), (2, 4, True), (5, 1, False)]
)
def test_causal_conv1d(monkeypatch, length, width, packed):
    monkeypatch.setattr(conv_gpu, "TOKENS", 8)
    monkeypatch.setattr(conv_gpu, "TILES", 2)
    ids = jnp.asarray(SEGMENTS[:, :length]) if packed else None
    shape = (4, length, 3)
    args = normal(*shape), normal(width, 3), normal(3), normal(4, width - 1, 3)
    assert_equal(
        lambda *args: conv_gpu.causal_conv1d(*args, ids, "silu"),
        lambda *args: causal_conv1d.IMPLEMENTATIONS["reference"](*args, ids, "silu"),
        args,
        (normal(*shape), normal(4, width - 1, 3)),
    )


@pytest.mark.parametrize("constant", [False, True])
def test_selective_scan(constant):
    runs = None if constant else reset_runs(jnp.asarray(SEGMENTS[:, :40]))
    shape, d_state = (4, 40, 6), 5
    B, C = (normal(6, 5), normal(6, 5)) if constant else normal(2, 4, 40, 3, 5)
    args = normal(*shape), jax.nn.softplus(normal(*shape)), -jnp.exp(normal(6, d_state)), B, C
    assert_equal(
        lambda *args: selective_gpu.selective_scan(*args, runs),
        lambda *args: selective_scan.IMPLEMENTATIONS["reference"](*args, runs),
        (*args, normal(4, 6, d_state)),
        (normal(*shape), normal(4, 6, d_state)),
    )


def ssd_inputs(length=130, batch=4, heads=2, headdim=8, groups=2, d_state=16):
    u, log_decay = normal(batch, length, heads, headdim), -jax.nn.softplus(normal(batch, length, heads))
    B, C = normal(2, batch, length, groups, d_state)
    return u, log_decay, B, C, normal(batch, heads, headdim, d_state)


def assert_ssd_equal(args, runs, tolerance=2e-5):
    """The kernels are run in the operands' dtype, also in float32, which the tensor cores do not take."""
    reference = ssd.IMPLEMENTATIONS["reference"]

    def run(u, log_decay, B, C, state):
        return ssd_gpu.ssd(u, None, log_decay, B, C, None, state, runs, None)

    def expect(*args):
        u, log_decay, B, C, state = (t.astype(jnp.float32) for t in args)
        return reference(u, None, log_decay, B, C, None, state, runs, None)

    assert_equal(run, expect, args, (args[0][:, ::-1], args[4][:, ::-1]), tolerance)


def test_ssd_with_segments():
    ids = jnp.asarray(SEGMENTS)
    u, log_decay, B, C, state = ssd_inputs()
    real = (ids != 0)[..., None]
    u, log_decay = jnp.where(real[..., None], u, 0), jnp.where(real, log_decay, 0)
    assert_ssd_equal((u, log_decay, B, C, state), reset_runs(ids))


def test_ssd_of_wide_heads_and_strong_decay(monkeypatch):
    """Each chunk decays by e^-200; blocks of several heads; a head in two parts."""
    monkeypatch.setattr(gpu_backward, "BLOCKS", 2)
    u, log_decay, B, C, state = ssd_inputs(length=65, batch=1, heads=4, headdim=72)
    assert_ssd_equal((u, log_decay.at[:, ::16].set(-50.0), B, C, state), None)


def test_ssd_in_bfloat16():
    u, log_decay, B, C, state = ssd_inputs(length=70, batch=1)
    u, B, C = (t.astype(jnp.bfloat16) for t in (u, B, C))
    assert_ssd_equal((u, log_decay, B, C, state), None, tolerance=1e-2)

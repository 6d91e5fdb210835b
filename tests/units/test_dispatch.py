"""Which implementation runs: by name, by preference, by the platform a program is lowered for."""

import logging

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import PREFERENCE, Kernel, resolve


def triple(x, n):
    return 3 * x


def double(x, n):
    return jnp.sin(2 * x)


def unsupported(x, n):
    return None if n % 8 == 0 else f"n = {n} is not a multiple of 8; pad to {-(-n // 8) * 8}"


AVAILABLE = {
    "reference": lambda x, n: x,
    "xla": triple,
    "pallas_tpu": Kernel(double, unsupported, "tpu", automatic=True),
    "pallas_gpu": Kernel(double, unsupported, "cuda"),
    "interpret": Kernel(double, unsupported),
}
X = jnp.ones(3)


def lowered(function, platform):
    return jax.jit(function).trace(X).lower(lowering_platforms=(platform,)).as_text()


def test_a_kernel_runs_where_the_program_is_lowered_for_its_platform():
    run = resolve("op", None, AVAILABLE)
    for transformed in (
        lambda x: run(x, 8),
        jax.grad(lambda x: run(x, 8).sum()),
        jax.vmap(lambda x: run(x, 8)),
    ):
        assert "sine" in lowered(transformed, "tpu") or "cosine" in lowered(transformed, "tpu")
        assert "sine" not in lowered(transformed, "cpu")
        assert "sine" not in lowered(transformed, "cuda")  # by name only
    assert "sine" not in lowered(lambda x: run(x, 7), "tpu")  # a shape it does not take


def test_a_kernel_may_leave_to_others_what_it_could_take():
    unwise = Kernel(double, unsupported, "tpu", automatic=True, unwise=lambda x, n: "slow" if n > 8 else None)
    available = AVAILABLE | {"pallas_tpu": unwise}
    for n, name, found in ((8, None, True), (16, None, False), (16, "pallas_tpu", True)):
        run = resolve("op", name, available)
        assert ("sine" in lowered(lambda x, run=run, n=n: run(x, n), "tpu")) is found


def test_a_named_kernel_finds_its_arrays_inside_of_tuples():
    pair = Kernel(lambda pair, n: double(pair[1], n), lambda pair, n: None, "tpu")
    run = resolve("op", "pallas_tpu", AVAILABLE | {"pallas_tpu": pair})
    assert "sine" in lowered(lambda x: run((None, x), 8), "tpu")


def test_a_name_runs_or_raises():
    assert "sine" in lowered(lambda x: resolve("op", "pallas_tpu", AVAILABLE)(x, 8), "tpu")
    assert "cosine" in lowered(jax.grad(lambda x: resolve("op", "pallas_gpu", AVAILABLE)(x, 8).sum()), "cuda")
    assert jnp.allclose(resolve("op", "interpret", AVAILABLE)(X, 8), jnp.sin(2.0))
    with pytest.raises(ValueError, match=r"'pallas_tpu' runs on tpu only, and .* compiled for cpu. Use None"):
        jax.jit(lambda x: resolve("op", "pallas_tpu", AVAILABLE)(x, 8))(X)
    with pytest.raises(
        ValueError, match="'interpret' cannot run this call: n = 7 is not a multiple of 8; pad to 8"
    ):
        resolve("op", "interpret", AVAILABLE)(X, 7)
    with pytest.raises(ValueError, match=r"implementation='triton' does not exist; use one of \['interpret'"):
        resolve("op", "triton", AVAILABLE)


def test_a_preference_gives_way_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv(PREFERENCE, "interpret")
    run = resolve("op", None, AVAILABLE)
    assert jnp.allclose(run(X, 8), jnp.sin(2.0))
    with caplog.at_level(logging.WARNING, "longspan.kernels"):
        for _ in range(2):
            assert jnp.allclose(run(X, 7), 3.0)
    assert [r.message for r in caplog.records] == [
        "op: 'xla' runs and not 'interpret': n = 7 is not a multiple of 8; pad to 8."
    ]
    monkeypatch.setenv(PREFERENCE, "cuDNN, which this op does not have")
    assert jnp.allclose(resolve("op", None, AVAILABLE)(X, 8), 3.0)

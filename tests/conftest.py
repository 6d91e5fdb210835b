"""Eight CPU devices, float32 matmuls, one persistent compilation cache for every test."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def mesh():
    """``mesh(data, fsdp, tensor, sequence)`` makes a mesh of the first devices, with Auto axes."""

    def make(*shape: int) -> jax.sharding.Mesh:
        size = 1
        for n in shape:
            size *= n
        names = ("data", "fsdp", "tensor", "sequence")
        auto = (jax.sharding.AxisType.Auto,) * 4
        return jax.make_mesh(shape, names, axis_types=auto, devices=jax.devices()[:size])

    return make

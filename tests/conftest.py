"""Eight CPU devices, quick compilation, float32 matmuls, one persistent compilation cache for every test."""

import itertools
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# For compiling TPU kernels without a TPU (runtime/aot.py), in several processes.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# The shapes are tiny: compiling takes the time, and without LLVM's optimisations half of it.
for flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

GOLDEN = ROOT / "tests" / "golden"
MAPS = pathlib.Path("/proc/self/maps")  # Linux only
MAX_MAPS = 20_000  # Linux lets a process have 65,530 (vm.max_map_count)
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Forget compiled programs once there are many: each holds several memory maps, and when the system
    refuses another one XLA's compiler brings the process down, in whatever test that is."""
    yield
    looked = next(_tests) % 10 == 0  # counting takes milliseconds
    if looked and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()


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

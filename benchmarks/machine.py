"""What the numbers were measured on, and what it can do at best: matmul rate and reading of memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import numpy as np

from benchmarks.timing import measure
from benchmarks.workload import Shape, build
from models.functional import parameter_count
from runtime.clock import measured_cpu_flops

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "mamba2-jax")


def describe() -> dict[str, Any]:
    """CPU, cores, memory, load, versions and date, as a dict for JSON."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The name the processor gives itself, with family and model, since clouds hide the rest."""
    info = pathlib.Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    numbers = [f"{key} {fields[label]}" for key, label in _CPU_NUMBERS if label in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


_CPU_NUMBERS = (("family", "cpu family"), ("model", "model"))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def matmul_rate() -> float:
    """FLOP/s of the fastest float32 matmul found now, over a few sizes."""
    measured_cpu_flops.cache_clear()
    return max(measured_cpu_flops(size, repeats=20) for size in (768, 1024, 2048))


def read_rate(size: int, repeats: int = 7) -> float:
    """Bytes/s at which ``size`` bytes are read over and over by a matrix-vector product, at best.

    What decoding does with its weights. 256 MiB measures memory; a size that fits a cache, that cache.
    """
    matrix = np.ones((max(1, size // 4096), 1024), np.float32)
    vector = np.ones(1024, np.float32)
    return matrix.nbytes / measure(lambda: matrix @ vector, repeats, min_seconds=0.05).best


def copy_rate(size: int = 256 * 2**20, repeats: int = 7) -> float:
    """Bytes/s read plus bytes/s written when ``size`` bytes are copied from memory to memory, at best."""
    source = np.ones(size // 4, np.float32)
    target = np.empty_like(source)
    return 2 * source.nbytes / measure(lambda: np.copyto(target, source), repeats, min_seconds=0.05).best


def floors(shape: Shape) -> dict[str, float]:
    """What bounds the model of ``shape`` from below on this machine.

    Keys: "matmul_flops", "memory_bytes_per_second", "weights_bytes_per_second" (of a matrix of the size of
    the weights, read over and over: from the cache that it fits in).
    """
    weights = 4 * parameter_count(build(shape)[0].shapes)
    return {
        "matmul_flops": matmul_rate(),
        "memory_bytes_per_second": read_rate(256 * 2**20),
        "weights_bytes_per_second": read_rate(weights),
    }

"""Other ways to compute what an op computes, and who takes part."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

JAX, TORCH = "jax", "torch"


@dataclasses.dataclass(frozen=True)
class Peer:
    """``where`` is "module:function": ``function(arrays, shape)`` returns y, or y first.

    Attributes:
        framework: whose arrays it takes.
        packages: that must be importable. on: the platform it runs on, None for any.
    """

    where: str
    framework: str
    about: str
    packages: tuple[str, ...] = ()
    on: str | None = None

    def load(self) -> Callable[[dict[str, Any], dict[str, int]], Any]:
        module, name = self.where.split(":")
        return getattr(importlib.import_module(module), name)

    def missing(self, platform: str) -> str | None:
        """Why it does not take part on ``platform``, and what to do about it; None if it does."""
        if self.on not in (None, platform):
            return f"runs on {self.on} only"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: pip install {' '.join(absent)}" if absent else None


def _jax(name: str, about: str) -> Peer:
    return Peer(f"benchmarks.ops.jax_peers:{name}", JAX, about)


def _torch(name: str, about: str, *packages: str, on: str | None = None) -> Peer:
    return Peer(f"benchmarks.ops.torch_peers:{name}", TORCH, about, ("torch", *packages), on)


PEERS: dict[str, dict[str, Peer]] = {
    "ssd": {
        "torch": _torch("ssd", "plain torch, chunk by chunk"),
        "mamba_ssm": _torch("mamba_ssm_ssd", "the authors' Triton kernels", "mamba_ssm", on="cuda"),
        "fla": _torch("fla_ssd", "flash-linear-attention, chunk_simple_gla", "fla", on="cuda"),
    },
    "linear_scan": {"associative_scan": _jax("linear_scan", "jax.lax.associative_scan")},
    "selective_scan": {
        "associative_scan": _jax("selective_scan", "jax.lax.associative_scan of all states at once"),
        "mamba_ssm": _torch("mamba_ssm_selective_scan", "the authors' CUDA kernel", "mamba_ssm", on="cuda"),
    },
    "causal_conv1d": {
        "lax.conv": _jax("causal_conv1d", "jax.lax.conv_general_dilated, depthwise"),
        "torch": _torch("causal_conv1d", "torch.nn.functional.conv1d, depthwise"),
    },
    "attention": {
        "jax.nn": _jax("attention", "jax.nn.dot_product_attention"),
        "torch": _torch("attention", "torch scaled_dot_product_attention"),
    },
    "long_conv": {
        "jax.scipy": _jax("long_conv", "jax.scipy.signal.fftconvolve"),
        "torch": _torch("long_conv", "torch.fft"),
    },
}

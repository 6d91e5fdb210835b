"""Parameters that know their logical axes and their role.

The axes name each dimension ("embed", "inner", ...); one table in ``runtime/mesh.py`` maps names to mesh
axes. The role says what the parameter is ("matrix", "embedding", "vector", "dynamics/A", ...); the optimizer
maps the longest matching prefix of it to learning rate, decay and algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import spmd

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array

AXES = "out_sharding"  # the metadata field flax keeps logical axes in, and extends for stacked layers
CALIBRATED = "frozen/calibrated"  # role of what is neither trained nor in checkpoints, but measured on a run


def param(value: jax.Array, axes: Sequence[str | None], role: str) -> nnx.Param:
    """A trained array with one logical axis name (or None) per dimension, and a role."""
    if len(axes) != value.ndim:
        raise ValueError(f"parameter of shape {value.shape} needs {value.ndim} axis names, got {tuple(axes)}")
    with nnx.use_eager_sharding(False):  # the names are metadata: no mesh is needed to make a layer
        return nnx.Param(value, out_sharding=tuple(axes), role=role)


def uniform_fan_in(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in = shape[0]: the default of torch.nn.Linear."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def normal(stddev: float) -> Initializer:
    """N(0, stddev^2)."""
    return lambda key, shape, dtype=jnp.float32: stddev * jax.random.normal(key, shape, dtype)


class Linear(nnx.Module):
    """``x[..., in] @ kernel[in, out] (+ bias)``; the kernel is cast to the dtype of ``x``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None],
        *,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        init: Initializer = uniform_fan_in,
        role: str = "matrix",
    ):
        self.kernel = param(init(rngs.params(), (in_features, out_features)), axes, role)
        self.bias = param(jnp.zeros(out_features), axes[1:], "vector") if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = project(x, self.kernel[...])
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def project(x: Float[Array, "*b I"], kernel: Float[Array, "I O"]) -> Float[Array, "*b O"]:
    """``x @ kernel``, the kernel cast to the dtype of ``x``."""
    kernel = kernel.astype(x.dtype)
    # On CPU a weight gradient that contracts two axes is 3x slower than one over flat rows; with time
    # sharded, flattening [B, L] would gather it.
    flat = x.ndim > 2 and spmd.sequence_parts() == 1
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1) if flat else x @ kernel

"""RMSNorm (optionally gated and grouped) and LayerNorm. Statistics are float32 whatever the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.param import param


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` over the last axis, in ``groups`` equal contiguous groups.

    With a ``gate`` (Mamba-2, arXiv:2405.21060 section 7): ``norm(x * silu(gate))`` by default, or
    ``norm(x) * silu(gate)`` with ``norm_before_gate``.

    Raises:
        ValueError: ``features`` is not a multiple of ``groups``.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        groups: int = 1,
        norm_before_gate: bool = False,
        axis: str = "norm",
    ):
        if features % groups:
            raise ValueError(f"RMSNorm: features={features} is not a multiple of groups={groups}")
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate
        self.scale = param(jnp.ones(features), (axis,), "vector/norm")

    def __call__(
        self,
        x: Float[Array, "*b C"],
        gate: Float[Array, "*b C"] | None = None,
        dtype: jnp.dtype | None = None,
    ) -> Float[Array, "*b C"]:
        """The result has ``dtype``, or that of ``x``."""
        out_dtype = dtype or x.dtype
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if gate is not None and not self.norm_before_gate:
            x = x * jax.nn.silu(gate.astype(x.dtype))
        grouped = x.reshape(*x.shape[:-1], self.groups, -1)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + self.eps)
        y = (grouped * scale).reshape(x.shape) * self.scale[...]
        if gate is not None and self.norm_before_gate:
            y = y * jax.nn.silu(gate.astype(x.dtype))
        return y.astype(out_dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / std * scale + bias`` over the last axis."""

    def __init__(self, features: int, *, eps: float = 1e-5, axis: str = "norm"):
        self.eps = eps
        self.scale = param(jnp.ones(features), (axis,), "vector/norm")
        self.bias = param(jnp.zeros(features), (axis,), "vector/norm")

    def __call__(self, x: Float[Array, "*b C"], dtype: jnp.dtype | None = None) -> Float[Array, "*b C"]:
        """The result has ``dtype``, or that of ``x``."""
        out_dtype = dtype or x.dtype
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(out_dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}

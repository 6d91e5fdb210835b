"""RMSNorm (optionally gated and grouped), LayerNorm, BatchNorm. Statistics are float32 whatever the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from layers.param import param
from pallas_kernels.rms_norm import gated_rms_norm, rms_norm


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
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "*b C"]:
        """The result has ``dtype``, or that of ``x``."""
        out_dtype = dtype or x.dtype
        if gate is not None:
            y = gated_rms_norm(x, gate, self.scale[...], self.groups, self.eps, self.norm_before_gate)
            return y.astype(out_dtype)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return rms_norm(x, self.scale[...], self.groups, self.eps).astype(out_dtype)


class LayerNorm(nnx.Module):
    """``(x - mean) / std * scale + bias`` over the last axis."""

    def __init__(self, features: int, *, eps: float = 1e-5, axis: str = "norm"):
        self.eps = eps
        self.scale = param(jnp.ones(features), (axis,), "vector/norm")
        self.bias = param(jnp.zeros(features), (axis,), "vector/norm")

    def __call__(self, x: Float[Array, "*b C"], dtype: DTypeLike | None = None) -> Float[Array, "*b C"]:
        """The result has ``dtype``, or that of ``x``."""
        out_dtype = dtype or x.dtype
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        # The root mean square of what is left is the standard deviation.
        return (rms_norm(x, self.scale[...], 1, self.eps) + self.bias[...]).astype(out_dtype)


class BatchNorm(nnx.Module):
    """``(x - mean) / std * scale + bias`` per feature, over a batch's real tokens (Ioffe & Szegedy 2015).

    The running statistics are no parameters: they go in and come out, ``{"mean", "var"}`` float32 [C].
    ``momentum`` is the share of them that a batch leaves (torch's ``momentum`` is 1 minus this).
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.9, axis: str = "norm"):
        self.features, self.eps, self.momentum = features, eps, momentum
        self.scale = param(jnp.ones(features), (axis,), "vector/norm")
        self.bias = param(jnp.zeros(features), (axis,), "vector/norm")

    def init_stats(self) -> dict[str, Float[Array, " C"]]:
        """Mean 0 and variance 1."""
        return {"mean": jnp.zeros(self.features), "var": jnp.ones(self.features)}

    def __call__(
        self,
        x: Float[Array, "*b C"],
        stats: dict[str, Float[Array, " C"]],
        *,
        training: bool,
        real: Bool[Array, "*b"] | None = None,
    ) -> tuple[Float[Array, "*b C"], dict[str, Float[Array, " C"]]]:
        """Normalised by the batch in training, else by ``stats``, in the dtype of x; and new statistics.

        ``real`` leaves padding out of them; None: every token is real.
        """
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean, var = stats["mean"], stats["var"]
        if training:
            axes = tuple(range(x.ndim - 1))
            kept = jnp.ones(x.shape[:-1], bool) if real is None else real
            count = jnp.sum(kept)
            mean = jnp.sum(wide, axis=axes, where=kept[..., None]) / count
            var = jnp.sum(jnp.square(wide - mean), axis=axes, where=kept[..., None]) / count
            unbiased = var * (count / jnp.maximum(count - 1, 1))  # what torch keeps
            new = {"mean": mean, "var": unbiased}
            mixed = jax.tree.map(lambda old, now: self.momentum * old + (1 - self.momentum) * now, stats, new)
            stats = jax.lax.stop_gradient(mixed)
        y = (wide - mean) * jax.lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype), stats


NORMS = {"rms": RMSNorm, "layer": LayerNorm}

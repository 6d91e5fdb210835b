"""Root-mean-square normalisation in groups, and Mamba-2's gated form of it (arXiv:2405.21060, section 7)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "*b C"], scale: Float[Array, " C"], groups: int, eps: float
) -> Float[Array, "*b C"]:
    """``x / rms(x) * scale``, the root mean square taken over each of ``groups`` contiguous groups.

    Its backward is written out because XLA on CPU sums products of two arrays a scalar at a time; as dot
    products (einsum) the same sums are six times faster.
    """
    return _forward(x, scale, groups, eps)[0]


def _forward(x: jax.Array, scale: jax.Array, groups: int, eps: float) -> tuple[jax.Array, tuple]:
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + eps)
    return (grouped * inverse).reshape(x.shape) * scale, (x, inverse, scale)


def _backward(groups: int, eps: float, residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, inverse, scale = residuals
    shape = (*x.shape[:-1], groups, x.shape[-1] // groups)
    normed, d_normed = x.reshape(shape) * inverse, (dy * scale).reshape(shape)
    d_scale = jnp.einsum("...gc,...gc->gc", normed, dy.reshape(shape), precision="highest")
    along = jnp.einsum("...c,...c->...", normed, d_normed, precision="highest")[..., None] / shape[-1]
    return ((d_normed - normed * along) * inverse).reshape(x.shape), d_scale.reshape(scale.shape)


rms_norm.defvjp(_forward, _backward)


def gated_rms_norm(
    x: Float[Array, "*b C"],
    gate: Float[Array, "*b C"],
    scale: Float[Array, " C"],
    groups: int,
    eps: float,
    norm_before_gate: bool,
) -> Float[Array, "*b C"]:
    """``norm(x * silu(gate))``, or ``norm(x) * silu(gate)`` with ``norm_before_gate``; float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    silu = jax.nn.silu(gate.astype(x.dtype))
    if norm_before_gate:
        return rms_norm(x, scale, groups, eps) * silu
    return rms_norm(x * silu, scale, groups, eps)

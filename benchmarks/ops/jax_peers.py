"""The ops in a line or two of public JAX: what one writes without this repository."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.signal

Arrays = dict[str, jax.Array]


def _scan(a: jax.Array, b: jax.Array) -> jax.Array:
    """h_t = a_t h_{t-1} + b_t along axis 1."""

    def combine(early: Any, late: Any) -> Any:
        return early[0] * late[0], late[0] * early[1] + late[1]

    return jax.lax.associative_scan(combine, (a, b), axis=1)[1]


def linear_scan(arrays: Arrays, shape: dict[str, int]) -> jax.Array:
    return _scan(arrays["a"], arrays["b"])


def selective_scan(arrays: Arrays, shape: dict[str, int]) -> jax.Array:
    """With [B, L, E, N] states in memory."""
    x, dt, A, B, C, D = (arrays[name] for name in ("x", "dt", "A", "B", "C", "D"))
    decay = jnp.exp(dt[..., None] * A)
    h = _scan(decay, (dt * x)[..., None] * B[:, :, None])
    return (jnp.einsum("blen,bln->ble", h, C) + D * x).astype(x.dtype)


def causal_conv1d(arrays: Arrays, shape: dict[str, int]) -> jax.Array:
    x, weight, bias = arrays["x"], arrays["weight"], arrays["bias"]
    taps, channels = weight.shape
    y = jax.lax.conv_general_dilated(
        x,
        weight[:, None],
        window_strides=(1,),
        padding=((taps - 1, 0),),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=channels,
    )
    return jax.nn.silu(y + bias)


def attention(arrays: Arrays, shape: dict[str, int]) -> jax.Array:
    return jax.nn.dot_product_attention(arrays["q"], arrays["k"], arrays["v"], is_causal=True)


def long_conv(arrays: Arrays, shape: dict[str, int]) -> jax.Array:
    u, k = arrays["u"], arrays["k"].T[None]
    return jax.scipy.signal.fftconvolve(u, k, axes=(1,))[:, : u.shape[1]].astype(u.dtype)

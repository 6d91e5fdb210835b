"""The truth for the depthwise causal convolution: a window of K inputs, moved one token at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv1d(
    x: Float[Array, "B L C"],
    weight: Float[Array, "K C"],
    bias: Float[Array, " C"],
    initial_state: Float[Array, "B K-1 C"],
    segment_ids: Int[Array, "B L"] | None,
    activation: str | None,
) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """y_t = act(bias + sum_k weight_k x_{t-(K-1)+k}); the state is the last K-1 inputs, newest last.

    Id 0 leaves the state as it is; any other id than the one before it, after the first, empties it. Results
    are float32 or wider.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, weight, bias, tail = (t.astype(dtype) for t in (x, weight, bias, initial_state))
    segment_ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def step(carry, token):
        tail, segment = carry
        x_t, id_t = token
        real = (id_t != 0)[:, None, None]
        reset = ((segment != 0) & (id_t != segment))[:, None, None]
        window = jnp.concatenate([jnp.where(reset, 0, tail), x_t[:, None]], axis=1)
        y = bias + jnp.einsum("bkc,kc->bc", window, weight)
        y = jax.nn.silu(y) if activation == "silu" else y
        tail = jnp.where(real, window[:, 1:], tail)
        return (tail, jnp.where(id_t != 0, id_t, segment)), jnp.where(real[:, 0], y, 0)

    start = (tail, jnp.zeros_like(segment_ids[:, 0]))
    (tail, _), y = jax.lax.scan(step, start, (jnp.moveaxis(x, 1, 0), segment_ids.T))
    return jnp.moveaxis(y, 0, 1), tail

"""Dense core-context-aware attention (Chen et al. 2024, arXiv 2412.12465), the truth: O(L^2) memory.

0-based, within a document: group c holds tokens c g .. (c + 1) g - 1, its last token's query attends to them
with the weights a_c, and KG_c = sum a_c k, VG_c = sum a_c v. Query t sees the cores c < n(t) =
max(0, floor((t + 1 - s) / g)) and the tokens from g n(t) to t, in one softmax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.sources import wide
from pallas_kernels.cca.groups import number_in_document


def core_context_attention(
    q: Float[Array, "B L H E"],
    k: Float[Array, "B L K E"],
    v: Float[Array, "B L K E"],
    segment_ids: Int[Array, "B L"] | None,
    g: int,
    s: int,
    scale: float,
    literal_boundary: bool,
    pooling: str,
) -> Float[Array, "B L H E"]:
    """Output in the dtype of ``q``; padding gives 0. A core stands at the token that ends its group."""
    ids = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    t = number_in_document(ids)
    group = q.shape[2] // k.shape[2]
    dtype = wide(q, k, v)
    q, k, v = (x.astype(dtype) for x in (q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)))
    same = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None]
    n_cores = jnp.maximum(0, (t + 1 - s) // g)
    first = g * n_cores - (1 if literal_boundary else 0)

    logits = scale * jnp.einsum("bthe,buhe->bhtu", q, k)
    a = _softmax(logits, same & (t[:, :, None] // g == t[:, None] // g))
    if pooling == "mean":
        by_kv_head = a.reshape(a.shape[0], -1, group, *a.shape[2:])
        a = jnp.broadcast_to(by_kv_head.mean(2, keepdims=True), by_kv_head.shape).reshape(a.shape)
    core_k, core_v = (jnp.einsum("bhcu,buhe->bche", a, x) for x in (k, v))
    sees_core = same & ((t + 1) % g == 0)[:, None] & (t[:, None] // g < n_cores[:, :, None])
    sees_token = same & (t[:, None] <= t[:, :, None]) & (t[:, None] >= first[:, :, None])

    core_logits = scale * jnp.einsum("bthe,bche->bhtc", q, core_k)
    p = _softmax(
        jnp.concatenate([core_logits, logits], axis=-1), jnp.concatenate([sees_core, sees_token], axis=-1)
    )
    y = jnp.einsum("bhtm,bmhe->bthe", p, jnp.concatenate([core_v, v], axis=1))
    return y.astype(q.dtype)


def _softmax(logits: Float[Array, "B H L m"], seen: Array) -> Float[Array, "B H L m"]:
    """Softmax over the last axis of what is seen; zeros where nothing is."""
    seen = seen[:, None]
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1), 0)

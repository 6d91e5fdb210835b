"""Dense softmax attention, the truth: logits of all sources side by side, one softmax over them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.sources import MASKED, Alibi, Source, tokens_of, visible, wide


def attention(
    q: Float[Array, "B Lq H E"],
    sources: Sequence[Source],
    q_segment_ids: Int[Array, "B Lq"] | None,
    scale: float,
    bias: Alibi | None,
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"]]:
    """Output in the dtype of ``q`` and log-sum-exp of the logits in float32; O(Lq Lk) memory."""
    length, heads = q.shape[1:3]
    logits, values = [], []
    for source in sources:
        group = heads // source.k.shape[2]
        k, v = (jnp.repeat(x, group, axis=2).astype(wide(q, x)) for x in (source.k, source.v))
        s = scale * jnp.einsum("blhe,bmhe->bhlm", q.astype(k.dtype), k)
        positional = source.mask.positional or bias is not None
        q_tokens, kv_tokens = tokens_of(source, length, q_segment_ids, positional)
        if bias is not None:
            assert q_tokens.positions is not None and kv_tokens.positions is not None
            distance = q_tokens.positions[:, :, None] - kv_tokens.positions[:, None]
            s -= jax.lax.stop_gradient(bias.slopes)[:, None, None] * distance[:, None]
        seen = visible(source.mask, q_tokens, kv_tokens)
        logits.append(s if seen is None else jnp.where(seen[:, None], s, MASKED))
        values.append(v)
    s, v = jnp.concatenate(logits, axis=-1), jnp.concatenate(values, axis=1)
    top = jax.lax.stop_gradient(s.max(-1, keepdims=True))
    p = jnp.where(s > MASKED, jnp.exp(s - top), 0.0)
    total = p.sum(-1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = jnp.einsum("bhlm,bmhe->blhe", p / total[..., None], v)
    return out.astype(q.dtype), jnp.where(some, top[..., 0] + jnp.log(total), MASKED)

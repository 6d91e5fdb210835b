"""NVIDIA's fused attention behind ``jax.nn.dot_product_attention``. Not yet run on hardware here.

It looks for cuDNN on the local machine while it is traced, so it cannot be a branch of
``jax.lax.platform_dependent``: whether it can run is asked of the local devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.sources import Alibi, Source

_INDEX_LIMIT = 2**31


def unsupported(
    q: Float[Array, "B Lq H E"],
    sources: Sequence[Source],
    q_segment_ids: Int[Array, "B Lq"] | None,
    bias: Alibi | None,
    return_lse: bool,
) -> str | None:
    """Why this call cannot run here, or None."""
    source, width = sources[0], q.shape[-1]
    places = (source.q_positions, source.kv_positions, source.kv_window_positions)
    per_token = (*places, source.kv_length, q_segment_ids, bias)
    problems = {
        "no GPU on this machine": jax.default_backend() != "gpu",
        "more than one key source": len(sources) > 1,
        "positions, lengths, segment ids and biases are not supported": any(x is not None for x in per_token),
        "a window without a causal mask": source.mask.window is not None and not source.mask.causal,
        "queries and keys of different lengths under a mask": source.mask.positional
        and q.shape[1] != source.k.shape[1],
        "the log-sum-exp is not returned": return_lse,
        f"dtype {q.dtype}, which is not bfloat16 or float16": q.dtype not in (jnp.bfloat16, jnp.float16)
        or {source.k.dtype, source.v.dtype} != {q.dtype},
        f"head dim {width}, which is not a multiple of 8 up to 128": width % 8 != 0 or width > 128,
        "2^31 elements or more": max(math.prod(q.shape), math.prod(source.k.shape)) >= _INDEX_LIMIT,
    }
    return next((reason for reason, found in problems.items() if found), None)


def attention(
    q: Float[Array, "B Lq H E"],
    sources: Sequence[Source],
    q_segment_ids: Int[Array, "B Lq"] | None,
    scale: float,
    bias: Alibi | None,
) -> tuple[Float[Array, "B Lq H E"], None]:
    """Same contract as the reference for calls with no :func:`unsupported` reason; no log-sum-exp."""
    (source,), mask = sources, sources[0].mask
    window = None if mask.window is None else (mask.window - 1, 0)
    out = jax.nn.dot_product_attention(
        q,
        source.k,
        source.v,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )
    return out, None

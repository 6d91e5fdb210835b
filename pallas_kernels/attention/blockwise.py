"""Blockwise softmax attention with memory O(L), whatever computes a source: the rule of differentiation.

The backward keeps the output and its log-sum-exp only, and recomputes the probabilities (Dao et al. 2022,
arXiv 2205.14135). Several sources are merged by their log-sum-exps; their backward needs nothing of each but
its keys, since a probability is exp(logit - log-sum-exp of all). :func:`forward` and :func:`backward` of
one source are what implementations differ in, here and on a ring of devices (``ring.py``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import tpu, xla
from pallas_kernels.attention.sources import Alibi, Source, Tokens, tokens_of, wide
from pallas_kernels.attention.xla import BLOCK, Out, Spec
from pallas_kernels.dispatch import Kernel, resolve

FORWARD: dict[str, Callable | Kernel] = {
    "xla": xla.forward,
    "pallas_tpu": Kernel(tpu.forward, tpu.unsupported, "tpu", automatic=True),
    "interpret": Kernel(functools.partial(tpu.forward, interpret=True), tpu.unsupported),
}
BACKWARD: dict[str, Callable | Kernel] = {
    "xla": xla.backward,
    "pallas_tpu": Kernel(tpu.backward, tpu.unsupported, "tpu", automatic=True),
    "interpret": Kernel(functools.partial(tpu.backward, interpret=True), tpu.unsupported),
}


def attention(
    q: Float[Array, "B Lq H E"],
    sources: Sequence[Source],
    q_segment_ids: Int[Array, "B Lq"] | None,
    scale: float,
    bias: Alibi | None,
    *,
    block: int = BLOCK,
    implementation: str | None = None,
) -> Out:
    """Same contract as the reference, in blocks of ``block`` queries and keys."""
    return _attend_all(q, sources, q_segment_ids, scale, bias, q.dtype, block, implementation)


def attend(
    q: Float[Array, "B Lq H E"],
    source: Source,
    q_segment_ids: Int[Array, "B Lq"] | None,
    scale: float,
    bias: Alibi | None,
    out_dtype: DTypeLike,
    *,
    block: int = BLOCK,
    implementation: str | None = None,
) -> Out:
    """Attention over one source, differentiable in q, k, v through the output and the log-sum-exp."""
    return _attend_all(q, [source], q_segment_ids, scale, bias, out_dtype, block, implementation)


def _attend_all(q, sources, q_segment_ids, scale, bias, out_dtype, block, implementation) -> Out:
    merged = jnp.dtype(out_dtype if len(sources) == 1 else wide(q))
    specs, tokens = [], []
    for source in sources:
        aligned = source.q_positions is None and source.kv_positions is None
        specs.append(Spec(source.mask, scale, aligned, merged, block, implementation))
        positional = source.mask.positional or bias is not None
        tokens.append(tokens_of(source, q.shape[1], q_segment_ids, positional))
    slopes = None if bias is None else jax.lax.stop_gradient(bias.slopes)
    keys = tuple((source.k, source.v) for source in sources)
    return _attend(tuple(specs), jnp.dtype(out_dtype), q, keys, tuple(tokens), slopes)


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> Out:
    """One softmax from two: outputs [B, Lq, H, E] weighted by their log-sum-exps [B, H, Lq]."""
    lse = jnp.logaddexp(lse_a, lse_b)
    a, b = (jnp.exp(x - lse).swapaxes(1, 2)[..., None] for x in (lse_a, lse_b))
    return a * out_a + b * out_b, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(specs, out_dtype, q, keys, tokens, slopes):
    parts = [
        forward(spec, q, k, v, q_tokens, kv_tokens, slopes)
        for spec, (k, v), (q_tokens, kv_tokens) in zip(specs, keys, tokens)
    ]
    out, lse = functools.reduce(lambda a, b: merge(*a, *b), parts)
    return out.astype(out_dtype), lse


def _attend_fwd(specs, out_dtype, q, keys, tokens, slopes):
    out, lse = _attend(specs, out_dtype, q, keys, tokens, slopes)
    return (out, lse), (q, keys, tokens, slopes, out, lse)


def _attend_bwd(specs, out_dtype, residuals, cotangents):
    q, keys, tokens, slopes, out, lse = residuals
    d_out, d_lse = cotangents
    delta = row_delta(out, d_out, d_lse)
    parts = [
        backward(spec, q, k, v, q_tokens, kv_tokens, slopes, lse, d_out, delta)
        for spec, (k, v), (q_tokens, kv_tokens) in zip(specs, keys, tokens)
    ]
    dq = functools.reduce(operator.add, (part[0] for part in parts))
    d_keys = tuple((dk.astype(k.dtype), dv.astype(v.dtype)) for (_, dk, dv), (k, v) in zip(parts, keys))
    return dq.astype(q.dtype), d_keys, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def row_delta(out: Array, d_out: Array, d_lse: Array) -> Float[Array, "B H Lq"]:
    """What a row subtracts from dP: sum(d_out * out) - d_lse."""
    return jnp.einsum("blhe,blhe->bhl", d_out, out, preferred_element_type=d_lse.dtype) - d_lse


def forward(spec: Spec, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes) -> Out:
    """Output [B, Lq, H, E] in ``spec.out_dtype`` and log-sum-exp [B, H, Lq] in float32."""
    run = resolve("attention", spec.implementation, FORWARD)
    return run(spec, q, k, v, q_tokens, kv_tokens, slopes)


def backward(
    spec: Spec, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes, lse, d_out, delta
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B Lk K E"], Float[Array, "B Lk K E"]]:
    """dq, dk, dv in float32, given ``lse`` of the whole softmax and :func:`row_delta`."""
    run = resolve("attention", spec.implementation, BACKWARD)
    return run(spec, q, k, v, q_tokens, kv_tokens, slopes, lse, d_out, delta)


def unsupported(
    q: Array, sources: Sequence[Source], q_segment_ids: Array | None, scale: float, bias: Alibi | None
) -> str | None:
    """Why the TPU kernels cannot take one of the sources, or None."""
    reasons = ((i, tpu.refused(q, source.k, source.v)) for i, source in enumerate(sources))
    return next((f"sources[{i}]: {reason}" for i, reason in reasons if reason), None)

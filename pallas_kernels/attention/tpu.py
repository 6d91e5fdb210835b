"""Flash attention on TPU: :func:`forward` and :func:`backward` with the contract of ``xla.py``'s.

The kernels read heads before time, [B, H, L, E], over whole blocks; XLA absorbs the transposes into the
projections around them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention import tpu_backward, tpu_forward, xla
from pallas_kernels.attention.sources import Tokens
from pallas_kernels.attention.tpu_tile import Call, Operands, needed_blocks, token_rows
from pallas_kernels.attention.xla import Out, Spec
from pallas_kernels.mosaic import LANES, SUBLANES, Interpret

MAX_WIDTH = 512


def unsupported(spec: Spec, q: Array, k: Array, v: Array, *_) -> str | None:
    """Why this call cannot run, or None."""
    return refused(q, k, v)


def refused(q: Array, k: Array, v: Array) -> str | None:
    """Why these arrays cannot be taken, or None."""
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast all to float32 or all to bfloat16"
    if q.shape[3] > MAX_WIDTH:
        return f"heads have {q.shape[3]} features, more than the {MAX_WIDTH} that fit; use more heads"
    return None


def forward(
    spec: Spec, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes, *, interpret: Interpret = False
) -> Out:
    """Output [B, Lq, H, E] in ``spec.out_dtype`` and log-sum-exp [B, H, Lq] in float32."""
    if q.shape[1] < SUBLANES:  # decoding: reading the keys where they are is all there is to do
        return xla.forward(spec, q, k, v, q_tokens, kv_tokens, slopes)
    call = _describe(spec, q, k, interpret)
    given = _operands(call, q, k, v, q_tokens, kv_tokens, slopes)
    out, lse = tpu_forward.forward(call, needed_blocks(call, q_tokens, kv_tokens)[0], given)
    return out[:, :, : call.q_length].swapaxes(1, 2), lse[:, :, 0, : call.q_length]


def backward(
    spec: Spec,
    q,
    k,
    v,
    q_tokens: Tokens,
    kv_tokens: Tokens,
    slopes,
    lse,
    d_out,
    delta,
    *,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B Lk K E"], Float[Array, "B Lk K E"]]:
    """dq, dk, dv in float32, given ``lse`` of the whole softmax and ``blockwise.row_delta``."""
    if q.shape[1] < SUBLANES:
        return xla.backward(spec, q, k, v, q_tokens, kv_tokens, slopes, lse, d_out, delta)
    call = _describe(spec, q, k, interpret)
    keys_of, queries_of = needed_blocks(call, q_tokens, kv_tokens)
    filled = -call.q_length % call.rows
    given = _operands(call, q, k, v, q_tokens, kv_tokens, slopes)._replace(
        d_out=_heads_first(d_out.astype(v.dtype), call.rows),
        # The rows that fill up the last block get the probability exp(-inf) = 0.
        lse=jnp.pad(lse, ((0, 0), (0, 0), (0, filled)), constant_values=jnp.inf)[:, :, None],
        delta=jnp.pad(delta, ((0, 0), (0, 0), (0, filled)))[:, :, None],
    )
    dq = tpu_backward.query_gradient(call, keys_of, given)
    dk, dv = tpu_backward.key_gradients(call, queries_of, given)
    lengths = (call.q_length, call.kv_length, call.kv_length)
    dq, dk, dv = (x[:, :, :n].swapaxes(1, 2) for x, n in zip((dq, dk, dv), lengths))
    return dq, dk, dv


def _describe(spec: Spec, q: Array, k: Array, interpret: Interpret) -> Call:
    rows, cols = (min(-(-spec.block // LANES), -(-n // LANES)) * LANES for n in (q.shape[1], k.shape[1]))
    lengths = q.shape[1], k.shape[1]
    return Call(spec.mask, spec.scale, spec.aligned, rows, cols, *lengths, spec.out_dtype, interpret)


def _operands(call: Call, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes) -> Operands:
    q_rows, kv_rows = token_rows(call, q_tokens, kv_tokens)
    if slopes is not None:
        slopes = jnp.broadcast_to(slopes.astype(jnp.float32)[:, None, None], (len(slopes), 1, LANES))
    k, v = _heads_first(k, call.cols), _heads_first(v, call.cols)
    return Operands(_heads_first(q, call.rows), k, v, q_rows, kv_rows, slopes)


def _heads_first(x: Array, block: int) -> Array:
    """[B, L, H, E] to [B, H, L, E], L filled up to whole blocks with zeros."""
    x = x.swapaxes(1, 2)
    filled = -x.shape[2] % block
    return jnp.pad(x, ((0, 0), (0, 0), (0, filled), (0, 0))) if filled else x

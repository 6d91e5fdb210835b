"""The SSD backward for TPU: chunks from the last to the first, the cotangent of the state carried in scratch.

Decays need no sums over pairs of tokens but one: alpha_i multiplies all that token i reads and divides all it
writes (``ssd/xla.py``), so

    d alpha_i = <dy_i, y_i> - <u_i, du_i>,  and at the end of the chunk + <dR', R'>

with y computed again and R' the start of the chunk after this one, visited just before. What the heads of a
group share, dB and dC, leaves as one part for each head block: XLA sums them, and nothing is added in an
order that could vary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic
from pallas_kernels.mosaic import dot
from pallas_kernels.ssd.tpu_chunk import (
    VMEM_LIMIT_BYTES,
    Decays,
    Plan,
    by_head,
    cumulative,
    decays,
    over_channels,
    through,
    visible,
)


def _kernel(*refs, plan: Plan):
    inputs, rest = refs[:10], list(refs[10:])
    x_ref, scale_ref, log_decay_ref, B_ref, C_ref, D_ref, starts_ref, dy_ref, d_final_ref, overlap_ref = (
        inputs
    )
    counts = rest.pop(0)[...] if plan.packed else None
    dx_ref, d_scale_ref, d_log_decay_ref, dB_ref, dC_ref, dD_ref, d_initial_ref, dR_ref, carried_ref = rest
    step, K = pl.program_id(2), plan.block

    @pl.when(step == 0)
    def _():
        dR_ref[...] = d_final_ref[...]
        carried_ref[...] = overlap_ref[...]
        dD_ref[...] = jnp.zeros_like(dD_ref)

    scale, decay = scale_ref[...], decays(cumulative(log_decay_ref[...]), counts)
    B, C, seen = B_ref[...], C_ref[...], visible(plan.chunk, counts)
    scores = jnp.where(seen, dot(B, C, (1, 1)), 0.0)
    x, dy = by_head(x_ref[...], K), by_head(dy_ref[...], K)
    d = chunk_gradients(x, scale, scores, B, C, starts_ref[...], dy, dR_ref[...], decay)
    dB_ref[...], dC_ref[...] = with_scores(d.B, d.C, jnp.where(seen, d.scores, 0.0), B, C)
    dx = d.u * scale[:, None, :] + dy * D_ref[...][:, :, None]
    dx_ref[...] = dx.reshape(-1, plan.chunk).astype(dx_ref.dtype)
    dD_ref[...] += sum_channels(dy * x)
    d_scale_ref[...] = d.scale
    d_log_decay_ref[...] = cumulative(d.alpha, reverse=True) + carried_ref[...]
    dR_ref[...], carried_ref[...] = d.R, d.overlap

    @pl.when(step == plan.chunks - 1)
    def _():
        d_initial_ref[...] = d.R


class Gradients(NamedTuple):
    """Of one chunk and K heads, float32."""

    u: jax.Array  # [K, P, Q] of scale x, the skip not included
    scale: jax.Array  # [K, Q]
    alpha: jax.Array  # [K, Q] without <dR', R'> of the state at the chunk's end, which is alpha_Q's
    scores: jax.Array  # [j, i], the sum over these heads; nothing is masked
    B: jax.Array  # [Q, N], the sum over these heads, without what comes through the scores
    C: jax.Array
    R: jax.Array  # [K*P, N] of the state at the chunk's start
    overlap: jax.Array  # [K, 1] <dR, R>, for the chunk before


def chunk_gradients(x, scale, scores, B, C, R, dy, dR, decay: Decays, read=None) -> Gradients:
    """Backward of a chunk.

    x, dy [K, P, Q] float32; scale [K, Q]; scores [j, i] as in the forward; B, C [Q, N]; R [K*P, N] the state
    at its start; dR float32 the cotangent of that at its end; read [K, Q] <dy_i, y_i> without the skip, or
    None: then it is computed.
    """
    dtype, K = B.dtype, x.shape[0]
    du, d_scores, within = _within_chunk(x, dy, scale, scores, decay, dtype, read is None)
    du += by_head(dot(dR.astype(dtype), B, (1, 1)), K) * decay.to_end[:, None, :]
    wrote = over_channels(x, decay.to_end * scale, dtype)
    reads = over_channels(dy, decay.from_start, dtype)
    if read is None:
        from_state = by_head(dot(R, C, (1, 1)), K)  # R C_i
        read = within + decay.from_start * jnp.sum(dy * from_state, 1)
    d_scale = jnp.sum(x * du, 1)
    d_start = through(dR, decay) + dot(reads, C, (1, 0))
    return Gradients(
        u=du,
        scale=d_scale,
        alpha=read - scale * d_scale,
        scores=d_scores,
        B=dot(wrote, dR.astype(dtype), (0, 0)),
        C=dot(reads, R, (0, 0)),
        R=d_start,
        overlap=sum_channels(by_head(d_start * R.astype(jnp.float32), K)),
    )


def with_scores(dB, dC, d_scores, B, C) -> tuple[jax.Array, jax.Array]:
    """Gradients of B and C [Q, N] with what comes through the scores B C^T, once for all heads."""
    d_scores = d_scores.astype(B.dtype)
    return dB + dot(d_scores, C, (1, 0)), dC + dot(d_scores, B, (0, 0))


def sum_channels(t: jax.Array) -> jax.Array:
    """[K, P, Q] -> [K, 1]."""
    return jnp.sum(jnp.sum(t, 1), 1, keepdims=True)


def _within_chunk(x, dy, scale, scores, decay: Decays, dtype, want_read: bool):
    """du [K, P, Q] of what tokens of a chunk read from each other; the gradient of their scores, summed over
    heads, [j, i] float32, not masked; and <dy_i, y_i> of it, [K, Q], if wanted."""
    u, dy = (x * scale[:, None, :]).astype(dtype), dy.astype(dtype)
    d_scores, du, read = jnp.zeros_like(scores), [], []
    for k in range(x.shape[0]):
        within = decay.within(k)
        d_weights = dot(u[k], dy[k], (0, 0)) * within
        d_scores += d_weights
        du.append(dot(dy[k], (scores * within).astype(dtype), (1, 1)))
        if want_read:
            read.append(jnp.sum(d_weights * scores, 0, keepdims=True))
    return jnp.stack(du), d_scores, jnp.concatenate(read, 0) if want_read else None


def backward(plan: Plan, x, scale, log_decay, B, C, D, starts, counts, dy, d_final, overlap):
    """Gradients of x, scale, log_decay, B, C, D and the initial state, all float32 but that of x.

    Args:
        x, scale, log_decay, B, C, D, counts: as for ``tpu_forward.forward``; starts: what it saved.
        dy [B, H*P, L] in the dtype of x; d_final [B, H*P, N] float32.
        overlap: <d_final, final> by head, [B, H].
    """
    plan = plan.backward()
    specs = plan.specs(reverse=True)
    blocks = (plan.batch, plan.head_blocks)
    inputs = {
        "x": (x, "channels"),
        "scale": (plan.split_heads(scale), "heads"),
        "log_decay": (plan.split_heads(log_decay), "heads"),
        "B": (B, "group"),
        "C": (C, "group"),
        "D": (D.reshape(-1, plan.block, 1), "head"),
        "starts": (starts, "starts"),
        "dy": (dy, "channels"),
        "d_final": (d_final, "state"),
        "overlap": (overlap.reshape(*blocks, plan.block, 1), "head_batch"),
    }
    if plan.packed:
        inputs["counts"] = (counts, "counts")
    outputs = _outputs(plan, x, d_final)
    results = mosaic.tpu_call(
        functools.partial(_kernel, plan=plan),
        name="ssd_backward",
        grid=(*blocks, plan.chunks),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[specs[kind] for _, kind in inputs.values()],
        out_specs=[specs[kind] for _, kind in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=[
            pltpu.VMEM((plan.rows, plan.d_state), jnp.float32),
            pltpu.VMEM((plan.block, 1), jnp.float32),
        ],
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
        interpret=plan.interpret,
    )(*(array for array, _ in inputs.values()))
    dx, d_scale, d_log_decay, dB, dC, dD, d_state = results
    dB, dC = (sum_parts(plan, t, B) for t in (dB, dC))
    return (
        dx,
        d_scale.reshape(scale.shape),
        d_log_decay.reshape(scale.shape),
        dB,
        dC,
        dD.sum(0).reshape(-1),
        d_state,
    )


def _outputs(plan: Plan, x, d_final) -> list[tuple[jax.ShapeDtypeStruct, str]]:
    """Shape and kind of block of every result of the kernel, in its order."""
    blocks, length = (plan.batch, plan.head_blocks), x.shape[2]

    def of(kind: str, *shape: int, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype), kind

    return [
        of("channels", *x.shape, dtype=x.dtype),
        of("heads", *blocks, plan.block, length),
        of("heads", *blocks, plan.block, length),
        of("group_parts", *blocks, length, plan.d_state),
        of("group_parts", *blocks, length, plan.d_state),
        of("head_batch", *blocks, plan.block, 1),
        of("state", *d_final.shape),
    ]


def sum_parts(plan: Plan, t: jax.Array, like: jax.Array) -> jax.Array:
    """[B, H/K, L, N] summed over the head blocks of each group, in the layout and the dtype of B."""
    t = t.reshape(plan.batch, plan.groups, plan.group_blocks, *t.shape[2:]).sum(2)
    return (t.swapaxes(1, 2) if plan.flat_groups else t).reshape(like.shape).astype(like.dtype)

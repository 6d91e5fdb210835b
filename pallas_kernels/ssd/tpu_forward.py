"""The SSD forward for TPU: ``ssd/xla.py``'s equations, a chunk of a block of heads at a time.

The scores B C^T are shared by the heads of a block, and the products with the state take all its channels at
once ([K*P, N]); only the product of masked scores and inputs is made head by head.
"""

from __future__ import annotations

import functools

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


def _kernel(x_ref, scale_ref, log_decay_ref, B_ref, C_ref, D_ref, initial_ref, *refs, plan: Plan, save: bool):
    rest = list(refs)
    counts = rest.pop(0)[...] if plan.packed else None
    y_ref, final_ref, *starts_ref, state_ref = rest
    step, K = pl.program_id(2), plan.block

    @pl.when(step == 0)
    def _():
        state_ref[...] = initial_ref[...]

    R = state_ref[...]
    if save:
        starts_ref[0][...] = R.astype(starts_ref[0].dtype)
    B, C, scale = B_ref[...], C_ref[...], scale_ref[...]
    decay = decays(cumulative(log_decay_ref[...]), counts)
    scores = jnp.where(visible(plan.chunk, counts), dot(B, C, (1, 1)), 0.0)
    x = by_head(x_ref[...], K)
    write_output(y_ref, x, scale, scores, C, D_ref[...], R, decay)
    state_ref[...] = through(R, decay) + dot(over_channels(x, decay.to_end * scale, B.dtype), B, (1, 0))

    @pl.when(step == plan.chunks - 1)
    def _():
        final_ref[...] = state_ref[...]


def write_output(y_ref, x, scale, scores, C, D, R, decay: Decays) -> None:
    """y [K*P, Q] of a chunk; x [K, P, Q] float32, scale [K, Q], D [K, 1], R [K*P, N] the state before it;
    scores [j, i] float32, zero where i does not see j."""
    K, P, _ = x.shape
    u = (x * scale[:, None, :]).astype(C.dtype)
    y = by_head(dot(R.astype(C.dtype), C, (1, 1)), K) * decay.from_start[:, None, :] + x * D[:, :, None]
    for k in range(K):
        weights = (scores * decay.within(k)).astype(C.dtype)
        y_ref[k * P : (k + 1) * P, :] = (y[k] + dot(u[k], weights, (1, 0))).astype(y_ref.dtype)


def forward(plan: Plan, x, scale, log_decay, B, C, D, state, counts, *, save: bool):
    """y, the final state, and the chunk-start states [B, L/Q, H*P, N] in the operands' dtype (None unless
    ``save``).

    x [B, H*P, L]; scale, log_decay [B, H, L]; B, C as ``Plan.flat_groups`` says; D [H]; state [B, H*P, N];
    counts [B, 1, L] or None.
    """
    specs = plan.specs()
    inputs = {
        "x": (x, "channels"),
        "scale": (plan.split_heads(scale), "heads"),
        "log_decay": (plan.split_heads(log_decay), "heads"),
        "B": (B, "group"),
        "C": (C, "group"),
        "D": (D.reshape(-1, plan.block, 1), "head"),
        "state": (state, "state"),
    }
    if plan.packed:
        inputs["counts"] = (counts, "counts")
    starts = (plan.batch, plan.chunks, *state.shape[1:])
    outputs = {"y": (x.shape, x.dtype, "channels"), "final": (state.shape, jnp.float32, "state")}
    if save:
        outputs["starts"] = (starts, B.dtype, "starts")
    results = mosaic.tpu_call(
        functools.partial(_kernel, plan=plan, save=save),
        name="ssd_forward",
        grid=(plan.batch, plan.head_blocks, plan.chunks),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[specs[kind] for _, kind in inputs.values()],
        out_specs=[specs[kind] for _, _, kind in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM((plan.rows, plan.d_state), jnp.float32)],
        vmem_limit_bytes=VMEM_LIMIT_BYTES,
        interpret=plan.interpret,
    )(*(array for array, _ in inputs.values()))
    return (*results, None)[:3]

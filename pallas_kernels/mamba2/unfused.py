"""The op of a Mamba-2 layer as a chain of ops: convolutions, softplus, SSD, gated norm."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.causal_conv1d import causal_conv1d_together
from pallas_kernels.mamba2.form import Form, Inputs, Weights
from pallas_kernels.rms_norm import gated_rms_norm
from pallas_kernels.ssd import ssd

NAMES = ("x", "B", "C")  # what goes through the convolution


def gated_ssd(
    inputs: Inputs,
    weights: Weights,
    conv_state: dict[str, Float[Array, "B _ _"] | None],
    initial_state: Float[Array, "B H P N"] | None,
    segment_ids: Int[Array, "B L"] | None,
    form: Form,
    *,
    implementation: str | None,
) -> tuple[Float[Array, "B L E"], dict[str, Float[Array, "B _ _"]], Float[Array, "B H P N"]]:
    """Every op by ``implementation``; each is sharded by itself under a mesh."""
    (batch, length, channels), heads = inputs.x.shape, inputs.dt.shape[2]
    mixed, tails = convolve(inputs, weights, conv_state, segment_ids, NAMES, implementation)
    y, final = ssd(
        mixed["x"].reshape(batch, length, heads, channels // heads),
        step_sizes(inputs, weights, form),
        weights.A,
        mixed["B"].reshape(batch, length, form.n_groups, -1),
        mixed["C"].reshape(batch, length, form.n_groups, -1),
        weights.D,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=form.chunk_size,
        implementation=implementation,
    )
    return gated(y.reshape(batch, length, channels), inputs.z, weights, form), tails, final


def gated(
    y: Float[Array, "B L E"], z: Float[Array, "B L E"], weights: Weights, form: Form
) -> Float[Array, "B L E"]:
    """norm(y silu(z)), or what ``form`` and ``weights`` have in its place."""
    if weights.norm is None:
        return y * jax.nn.silu(z)
    normed = gated_rms_norm(y, z, weights.norm, form.n_groups, form.norm_eps, form.norm_before_gate)
    return normed.astype(y.dtype)


def convolve(
    inputs: Inputs,
    weights: Weights,
    conv_state: dict[str, Float[Array, "B _ _"] | None],
    segment_ids: Int[Array, "B L"] | None,
    names: tuple[str, ...],
    implementation: str | None,
) -> tuple[dict[str, Float[Array, "B L _"]], dict[str, Float[Array, "B _ _"]]]:
    """Causal convolution and SiLU of the inputs with these names, and the tails they leave."""
    ys, tails = causal_conv1d_together(
        [getattr(inputs, name) for name in names],
        [weights.conv[name][0] for name in names],
        [weights.conv[name][1] for name in names],
        initial_states=[conv_state[name] for name in names],
        segment_ids=segment_ids,
        activation="silu",
        implementation=implementation,
    )
    return dict(zip(names, ys)), dict(zip(names, tails))


def step_sizes(inputs: Inputs, weights: Weights, form: Form) -> Float[Array, "B L H"]:
    """softplus(dt + bias), clamped, in the dtype of the bias."""
    bias = weights.dt_bias
    dt = jax.nn.softplus(inputs.dt.astype(bias.dtype) + bias)
    return dt if form.dt_limit == (0.0, math.inf) else jnp.clip(dt, *form.dt_limit)

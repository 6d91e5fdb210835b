"""A Mamba-2 layer between its projections on TPU: one kernel forward, one backward, and the rule around them.

Left to XLA: dt (a number a head), the convolution of B and C (two groups of channels; the kernel of
``causal_conv1d``), and the norm's scale of each token, an elementwise prologue of the product that follows.
As in ``ssd/tpu.py`` time goes into lanes by transpositions that XLA absorbs into the layouts around the op.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.causal_conv1d import tpu as conv_tpu
from pallas_kernels.causal_conv1d import xla as conv_xla
from pallas_kernels.mamba2 import unfused
from pallas_kernels.mamba2.form import Form, Inputs, Weights
from pallas_kernels.mamba2.tpu_backward import backward
from pallas_kernels.mamba2.tpu_forward import forward
from pallas_kernels.mamba2.tpu_tile import Setup
from pallas_kernels.mosaic import LANES, SUBLANES
from pallas_kernels.segments import reset_runs
from pallas_kernels.ssd.tpu import chunk_counts, make_plan, pad, to_groups


def unsupported(
    inputs: Inputs, weights: Weights, conv_state, initial_state, segment_ids, form: Form, *, interpret=False
) -> str | None:
    """Why the kernels cannot take a call; see ``dispatch.Kernel``."""
    dtypes = {name: t.dtype for name, t in inputs._asdict().items() if name != "dt"}
    if len(set(dtypes.values())) > 1:
        return "the projections differ in dtype: " + ", ".join(f"{n} {d}" for n, d in dtypes.items())
    if inputs.x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {inputs.x.dtype}; TPU kernels take float32 and bfloat16"
    if weights.dt_bias.dtype != jnp.float32 or weights.A.dtype != jnp.float32:
        return f"dt_bias is {weights.dt_bias.dtype} and A {weights.A.dtype}; decays are computed in float32"
    if weights.norm is not None and form.norm_before_gate:
        return "norm_before_gate=True; the kernels gate before the norm"
    headdim, width = inputs.x.shape[2] // inputs.dt.shape[2], weights.conv["x"][0].shape[0]
    if headdim % SUBLANES:
        return f"P = {headdim} channels a head are not a multiple of {SUBLANES}; pad the heads"
    if not 2 <= width <= SUBLANES:
        return f"K = {width} taps are not within 2..{SUBLANES}"
    chunk = form.chunk_size
    if chunk is not None and chunk < inputs.x.shape[1] and chunk % (SUBLANES if interpret else LANES):
        return f"chunk_size = {chunk} is not a multiple of {LANES}, a tile of lanes; use 128 or None"
    return None


def gated_ssd(
    inputs: Inputs,
    weights: Weights,
    conv_state: dict[str, Float[Array, "B T _"] | None],
    initial_state: Float[Array, "B H P N"] | None,
    segment_ids: Int[Array, "B L"] | None,
    form: Form,
    *,
    interpret: mosaic.Interpret = False,
) -> tuple[Float[Array, "B L E"], dict[str, Float[Array, "B T _"]], Float[Array, "B H P N"]]:
    """The contract of ``unfused.gated_ssd``, for calls that :func:`unsupported` takes; one token is XLA's."""
    if inputs.x.shape[1] == 1:
        return unfused.gated_ssd(
            inputs, weights, conv_state, initial_state, segment_ids, form, implementation="xla"
        )
    (batch, length, channels), heads = inputs.x.shape, inputs.dt.shape[2]
    (taps, bias), dtype = weights.conv["x"], inputs.x.dtype
    width, f32 = taps.shape[0], jnp.float32
    past = {
        name: jnp.zeros((batch, width - 1, getattr(inputs, name).shape[2]), dtype) if t is None else t
        for name, t in conv_state.items()
    }
    mixed = {
        name: conv_tpu.causal_conv1d(
            getattr(inputs, name),
            weights.conv[name][0],
            _or_zeros(weights.conv[name][1], getattr(inputs, name).shape[2]),
            past[name],
            segment_ids,
            "silu",
            interpret=interpret,
        )
        for name in ("B", "C")
    }
    tails = {
        "x": conv_xla.last_inputs(inputs.x, past["x"], segment_ids),
        "B": mixed["B"][1],
        "C": mixed["C"][1],
    }
    by_group = (batch, length, form.n_groups, -1)
    B, C = mixed["B"][0].reshape(by_group), mixed["C"][0].reshape(by_group)
    four = (batch, length, heads, channels // heads)
    plan = make_plan(four, B.shape, dtype, segment_ids is not None, form.chunk_size, interpret)
    setup = Setup(plan, width, weights.norm is not None, form.norm_eps)

    after = {1: plan.chunks * plan.chunk - length}
    scale = unfused.step_sizes(inputs, weights, form).astype(f32)
    reach, first, counts = None, jnp.zeros(batch, jnp.int32), None
    if segment_ids is not None:
        scale = jnp.where((segment_ids != 0)[..., None], scale, 0)
        reach = pad(conv_xla.reach(segment_ids, width), after)[:, None]
        first = jnp.argmax(segment_ids != 0, axis=1).astype(jnp.int32)
        counts = chunk_counts(pad(reset_runs(segment_ids), after, mode="edge"), plan.chunk)
    # As in ``ssd/tpu.py``: below the smallest normal number a decay is zero.
    log_decay = jnp.maximum(scale * weights.A.astype(f32), jnp.log(jnp.finfo(f32).tiny))
    scale, log_decay, x, z = (pad(t, after).swapaxes(1, 2) for t in (scale, log_decay, inputs.x, inputs.z))
    norm = jnp.ones(channels) if weights.norm is None else weights.norm
    columns = jnp.concatenate([taps, _or_zeros(bias, channels)[None], norm[None]]).astype(f32).T
    states = (batch, heads, channels // heads, plan.d_state)
    state = jnp.zeros(states, f32) if initial_state is None else initial_state.astype(f32)
    y, final = _mix(
        setup,
        x,
        z,
        columns,
        past["x"].astype(dtype).swapaxes(1, 2),
        scale,
        log_decay,
        to_groups(plan, pad(B, after)),
        to_groups(plan, pad(C, after)),
        weights.D.astype(f32),
        state.reshape(batch, channels, plan.d_state),
        reach,
        first,
        counts,
    )
    tails = {name: tail.astype(past[name].dtype) for name, tail in tails.items()}
    return y.swapaxes(1, 2)[:, :length], tails, final.reshape(states)


def _or_zeros(bias: jax.Array | None, channels: int) -> jax.Array:
    return jnp.zeros(channels) if bias is None else bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(setup, *arrays):
    """(x, z, columns, past, scale, log_decay, B, C, D, state, reach, first, counts) as ``forward`` takes them
    -> y [B, H*P, L] after the norm, the final state."""
    gated, squares, final, _ = forward(setup, *arrays, save=False)
    return _normed(setup, gated, squares, arrays[2])[0], final


def _mix_forward(setup, *arrays):
    gated, squares, final, starts = forward(setup, *arrays, save=True)
    y, inverse = _normed(setup, gated, squares, arrays[2])
    return (y, final), (arrays, gated, inverse, final, starts)


def _mix_backward(setup: Setup, residuals, cotangents):
    arrays, gated, inverse, final, starts = residuals
    x, z, columns, past, scale, log_decay, B, C, D, _, reach, first, counts = arrays
    (d_out, d_final), plan = cotangents, setup.plan
    d = {
        "first": first,
        "x": x,
        "z": z,
        "d_out": d_out,
        "columns": columns,
        "past": past,
        "scale": scale,
        "log_decay": log_decay,
        "B": B,
        "C": C,
        "D": D,
        "starts": starts,
        "d_final": d_final,
        "overlap": jnp.sum((d_final * final).reshape(plan.batch, plan.heads, -1), axis=-1),
    }
    if setup.norm:
        along = _by_group(setup, gated) * _by_group(setup, d_out) * _weight(setup, columns)
        along = jnp.sum(along, axis=2, keepdims=True)
        d |= {"inverse": inverse, "pull": inverse**3 * along * (plan.groups / x.shape[1])}
    if plan.packed:
        d |= {"reach": reach, "counts": counts}
    d = backward(setup, d)
    names = ("dx", "dz", "d_columns", "d_past", "d_scale", "d_log_decay", "dB", "dC", "dD", "d_initial")
    d["d_past"] = d["d_past"].astype(past.dtype)
    return (*(d[name] for name in names), None, None, None)


_mix.defvjp(_mix_forward, _mix_backward)


def _normed(setup: Setup, gated, squares, columns) -> tuple[jax.Array, jax.Array | None]:
    """y after the norm [B, H*P, L], and 1 / rms [B, G, 1, L]."""
    if not setup.norm:
        return gated, None
    plan = setup.plan
    squares = squares.reshape(plan.batch, plan.groups, plan.group_blocks, 1, -1).sum(2)
    inverse = jax.lax.rsqrt(squares * (plan.groups / gated.shape[1]) + setup.eps)
    y = _by_group(setup, gated) * inverse * _weight(setup, columns)
    return y.reshape(gated.shape).astype(gated.dtype), inverse


def _by_group(setup: Setup, t: jax.Array) -> jax.Array:
    """[B, H*P, L] -> float32 [B, G, H*P/G, L]."""
    return t.reshape(t.shape[0], setup.plan.groups, -1, t.shape[2]).astype(jnp.float32)


def _weight(setup: Setup, columns: jax.Array) -> jax.Array:
    """The norm's weight [1, G, H*P/G, 1]."""
    return columns[:, setup.width + 1].reshape(1, setup.plan.groups, -1, 1)

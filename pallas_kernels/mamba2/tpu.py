"""A Mamba-2 layer between its projections on TPU: one kernel forward, one backward, and the rule around them.

Left to XLA: dt (a number a head) and the convolution of B and C (two groups of channels; the kernel of
``causal_conv1d``). As in ``ssd/tpu.py`` time goes into lanes by transpositions that XLA absorbs into the
layouts around the op.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic, tuning
from pallas_kernels.causal_conv1d import tpu as conv_tpu
from pallas_kernels.causal_conv1d import xla as conv_xla
from pallas_kernels.dispatch import unsuitable
from pallas_kernels.mamba2 import unfused
from pallas_kernels.mamba2.form import Form, Inputs, Weights
from pallas_kernels.mamba2.tpu_backward import backward
from pallas_kernels.mamba2.tpu_forward import forward
from pallas_kernels.mamba2.tpu_tile import VMEM_LIMIT_BYTES, Setup
from pallas_kernels.mosaic import LANES, SUBLANES
from pallas_kernels.segments import reset_runs
from pallas_kernels.ssd.tpu import chunk_counts, largest_divisor, make_plan, pad, to_groups

DEFAULT = {"chunk": LANES, "part": 16}  # tokens of a chunk; heads worked on at once
MAX_ELEMENTS = 2**31 - 1
TWO_CORES = ("v4", "v5p")


def unsupported(
    inputs: Inputs, weights: Weights, conv_state, initial_state, segment_ids, form: Form, *, interpret=False
) -> str | None:
    """Why the kernels cannot take a call; see ``dispatch.Kernel``."""
    dtypes = {name: t.dtype for name, t in inputs._asdict().items() if name != "dt"}
    if len(set(dtypes.values())) > 1:
        return "the projections differ in dtype: " + ", ".join(f"{n} {d}" for n, d in dtypes.items())
    if reason := unsuitable({"x": inputs.x}, jnp.float32, jnp.bfloat16):
        return reason
    if reason := unsuitable({"dt_bias": weights.dt_bias, "A": weights.A}, jnp.float32):
        return reason
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
    setup = make_setup(inputs, weights, segment_ids, form, interpret)
    starts = setup.plan.chunks * math.prod(inputs.x.shape[::2]) * setup.plan.d_state
    if max(starts, inputs.x.size) > MAX_ELEMENTS:
        return f"chunk-start states of {starts} elements are more than 2^31 - 1; feed the sequence in pieces"
    if not interpret and (size := setup.fast_memory(inputs.x.dtype.itemsize)) > VMEM_LIMIT_BYTES:
        return (
            f"a grid step of {setup.plan.block} heads needs {size / mosaic.MiB:.0f} MiB of fast memory, more "
            f"than {VMEM_LIMIT_BYTES / mosaic.MiB:.0f}; the norm's groups of fewer heads, or bfloat16, fit"
        )
    return None


def unwise(
    inputs: Inputs, weights: Weights, conv_state, initial_state, segment_ids, form: Form
) -> str | None:
    """Why None leaves the call to a kernel for each op, whose grids are finer; see ``dispatch.Kernel``."""
    steps = inputs.x.shape[0] * form.n_groups
    if tuning.current_chip() in TWO_CORES and steps % 2:
        return f"rows times groups is {steps}, and a chip with two cores wants an even number"
    return None


def make_setup(inputs: Inputs, weights: Weights, segment_ids, form: Form, interpret) -> Setup:
    """A grid step is a group: the norm is over its channels."""
    (batch, length, channels), heads = inputs.x.shape, inputs.dt.shape[2]
    four = (batch, max(length, SUBLANES), heads, channels // heads)
    groups = (batch, length, form.n_groups, inputs.B.shape[2] // form.n_groups)
    shape = {"B": batch, "L": length, "H": heads, "P": four[3], "N": groups[3], "G": form.n_groups}
    sizes = tuning.blocks("gated_ssd", shape, inputs.x.dtype, DEFAULT)
    chunk = form.chunk_size or sizes["chunk"]
    plan = make_plan(four, groups, inputs.x.dtype, segment_ids is not None, chunk, interpret)
    block = heads // form.n_groups
    plan = dataclasses.replace(plan, block=block, backward_block=block)
    part, width = largest_divisor(block, sizes["part"]), weights.conv["x"][0].shape[0]
    return Setup(plan, part, width, weights.norm is not None, form.norm_eps)


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
    setup = make_setup(inputs, weights, segment_ids, form, interpret)
    plan, width = setup.plan, setup.width
    (batch, length, channels), heads = inputs.x.shape, inputs.dt.shape[2]
    after = {1: plan.chunks * plan.chunk - length}
    B, C, tails = _convolve_B_and_C(inputs, weights, conv_state, segment_ids, interpret)
    x, past, tails["x"] = _with_past(inputs.x, conv_state["x"], segment_ids, width)
    by_group = (batch, length, form.n_groups, -1)
    states = (batch, heads, channels // heads, plan.d_state)
    state = jnp.zeros(states) if initial_state is None else initial_state
    arrays = {
        "x": pad(x, after).swapaxes(1, 2),
        "z": pad(inputs.z, after).swapaxes(1, 2),
        "columns": _columns(weights, channels),
        "past": jnp.pad(past.swapaxes(1, 2), [(0, 0), (0, 0), (plan.chunk - width + 1, 0)]),
        **_steps(inputs, weights, segment_ids, form, after),
        "B": to_groups(plan, pad(B.reshape(by_group), after)),
        "C": to_groups(plan, pad(C.reshape(by_group), after)),
        "D": weights.D.astype(jnp.float32),
        "initial": state.astype(jnp.float32).reshape(batch, channels, plan.d_state),
    }
    masks = {}
    if segment_ids is not None:
        reach = _reach(segment_ids, width, has_past=conv_state["x"] is not None)
        counts = chunk_counts(pad(reset_runs(segment_ids), after, mode="edge"), plan.chunk)
        masks = {"reach": pad(reach, after)[:, None], "counts": counts}
    y, final = _mix(setup, arrays, masks)
    return y.swapaxes(1, 2)[:, :length], tails, final.reshape(states)


def _convolve_B_and_C(inputs: Inputs, weights: Weights, conv_state, segment_ids, interpret):
    """B and C after convolution and SiLU, and by name the tails they leave."""
    mixed, tails = {}, {}
    for name in ("B", "C"):
        t, (taps, bias), past = getattr(inputs, name), weights.conv[name], conv_state[name]
        bias = jnp.zeros(t.shape[2]) if bias is None else bias
        like = jnp.zeros((t.shape[0], taps.shape[0] - 1, t.shape[2]), t.dtype) if past is None else past
        mixed[name], tail = conv_tpu.causal_conv1d(
            t, taps, bias, like, segment_ids, "silu", interpret=interpret
        )
        tails[name] = tail.astype(like.dtype)
    return mixed["B"], mixed["C"], tails


def _with_past(x, past, segment_ids, width: int):
    """x [B, L, E], the K-1 inputs before its first token, and those before its end, the new past.

    A past that stands before the first real token is written into the padding there.
    """
    if past is None:
        zeros = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
        return x, zeros, conv_xla.last_inputs(x, zeros, segment_ids)
    tail = conv_xla.last_inputs(x, past, segment_ids).astype(past.dtype)
    if segment_ids is None:
        return x, past.astype(x.dtype), tail
    extended, _ = conv_xla.extend(x, past, segment_ids)
    return extended[:, width - 1 :], extended[:, : width - 1], tail


def _reach(segment_ids, width: int, *, has_past: bool) -> jax.Array:
    """How many of the last K inputs each token sees, [B, L]: without a past none before the first real."""
    reach = conv_xla.reach(segment_ids, width)
    if has_past:
        return reach
    first = jnp.argmax(segment_ids != 0, axis=1).astype(jnp.int32)
    since = jnp.arange(segment_ids.shape[1], dtype=jnp.int32) - first[:, None] + 1
    return jnp.minimum(reach, jnp.maximum(since, 0))


def _steps(inputs: Inputs, weights: Weights, segment_ids, form: Form, after) -> dict[str, jax.Array]:
    """dt and its product with A, [B, H, L] float32; 0 at padding."""
    scale = unfused.step_sizes(inputs, weights, form).astype(jnp.float32)
    if segment_ids is not None:
        scale = jnp.where((segment_ids != 0)[..., None], scale, 0)
    # As in ``ssd/tpu.py``: below the smallest normal number a decay is zero.
    log_decay = jnp.maximum(scale * weights.A, jnp.log(jnp.finfo(jnp.float32).tiny))
    return {
        "scale": pad(scale, after).swapaxes(1, 2),
        "log_decay": pad(log_decay, after).swapaxes(1, 2),
    }


def _columns(weights: Weights, channels: int) -> jax.Array:
    """Taps, bias and the norm's weight of each channel, [E, K+2] float32."""
    taps, bias = weights.conv["x"]
    bias = jnp.zeros(channels) if bias is None else bias
    norm = jnp.ones(channels) if weights.norm is None else weights.norm
    return jnp.concatenate([taps, bias[None], norm[None]]).astype(jnp.float32).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(setup: Setup, arrays: dict[str, jax.Array], masks: dict[str, jax.Array]):
    """``arrays`` and ``masks`` as ``forward`` takes them -> y [B, H*P, L] after the norm, the final state."""
    results = forward(setup, arrays | masks, save=False)
    return results["y"], results["final"]


def _mix_forward(setup: Setup, arrays, masks):
    results = forward(setup, arrays | masks, save=True)
    y = results.pop("y")
    return (y, results["final"]), (arrays, masks, results)


def _mix_backward(setup: Setup, residuals, cotangents):
    arrays, masks, saved = residuals
    d_out, d_final = cotangents
    final = saved.pop("final")
    overlap = jnp.sum((d_final * final).reshape(setup.plan.batch, setup.plan.heads, -1), axis=-1)
    d = backward(setup, arrays | masks | saved | {"d_out": d_out, "d_final": d_final, "overlap": overlap})
    return {name: d[f"d_{name}" if f"d_{name}" in d else f"d{name}"] for name in arrays}, None


_mix.defvjp(_mix_forward, _mix_backward)

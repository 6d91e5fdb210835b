"""The selective scan as Pallas kernels for TPU: layouts, padding and the rule of differentiation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from pallas_kernels import mosaic, planes
from pallas_kernels.dispatch import unsuitable
from pallas_kernels.mosaic import LANES, SUBLANES, MiB
from pallas_kernels.selective_scan import xla
from pallas_kernels.selective_scan.tpu_backward import backward
from pallas_kernels.selective_scan.tpu_forward import forward
from pallas_kernels.selective_scan.tpu_plan import VMEM, Plan, block_sizes

ONE_BLOCK = 512  # channels that are one block whatever their number


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Inexact[Array, "E N"],
    B: Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    C: Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    initial_state: Inexact[Array, "B E N"],
    runs: Int[Array, "B L"] | None,
    *,
    interpret: mosaic.Interpret = False,
) -> tuple[Float[Array, "B L E"], Inexact[Array, "B E N"]]:
    """Same contract as ``xla.selective_scan``; one token is left to XLA."""
    if x.shape[1] == 1:
        return xla.selective_scan(x, dt, A, B, C, initial_state, runs)
    plan = _plan(x, A, B, C, runs, interpret)
    channels, d_state, groups = *A.shape, plan.groups
    own, tokens = channels // groups, plan.time_blocks * plan.sizes.tokens - plan.length

    def by_channel(t: jax.Array) -> jax.Array:
        """[..., E] with the channels of each group padded to whole blocks."""
        t = t.reshape(*t.shape[:-1], groups, own)
        return _pad(t, {-1: plan.channels - own}).reshape(*t.shape[:-2], -1)

    def by_state(t: jax.Array) -> jax.Array:
        """[..., E, N] as [..., N, E]."""
        return by_channel(_pad(t.swapaxes(-1, -2), {-2: plan.d_state - d_state}))

    def vectors(t: jax.Array) -> jax.Array:
        t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
        if t.ndim == 2:
            return by_state(t)
        t = jnp.repeat(t, groups // t.shape[2], axis=2) if t.shape[2] != groups else t
        t = jnp.moveaxis(t, 1, 3)  # [B, G, N, L]
        return _pad(t, {2: plan.d_state - d_state, 3: tokens})

    keep = None
    if runs is not None:
        resets = jnp.diff(runs, axis=1, prepend=0) != 0
        keep = 1.0 - _pad(resets, {1: tokens}).astype(jnp.float32)
        keep = jnp.repeat(keep[:, None], SUBLANES, axis=1)
    x, dt = by_channel(x), by_channel(dt)
    y, final = _scan(plan, x, dt, by_state(A), vectors(B), vectors(C), by_state(initial_state), keep)

    def back(t: jax.Array) -> jax.Array:
        t = t.reshape(*t.shape[:-1], groups, -1)[..., :own]
        return t.reshape(*t.shape[:-2], channels)

    return back(y), back(final)[:, :d_state].swapaxes(1, 2)


def unsupported(x, dt, A, B, C, initial_state, runs) -> str | None:
    """Why the kernels cannot take a call; see ``dispatch.Kernel``."""
    arrays = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "initial_state": initial_state}
    if reason := unsuitable(arrays, jnp.float32, jnp.bfloat16, jnp.complex64):
        return reason
    counts = {t.shape[2] for t in (B, C) if t.ndim == 4}
    if len(counts) == 2 and min(counts) != 1:
        return f"B and C have {B.shape[2]} and {C.shape[2]} groups; repeat the fewer to as many as the others"
    if (needed := _plan(x, A, B, C, runs, False).vmem_bytes) > VMEM:
        return (
            f"with N = {A.shape[1]} a block of {LANES} tokens takes {needed / MiB:.0f} MiB of fast memory "
            f"and may take {VMEM // MiB}; lower N"
        )
    return None


def _plan(x, A, B, C, runs, interpret: mosaic.Interpret) -> Plan:
    batch, length, channels = x.shape
    groups = max(t.shape[2] if t.ndim == 4 else 1 for t in (B, C))
    own = channels // groups
    if groups > 1 or own > ONE_BLOCK:
        own = -(-own // LANES) * LANES
    states = -(-A.shape[1] // SUBLANES) * SUBLANES
    return Plan(
        batch=batch,
        length=length,
        groups=groups,
        channels=own,
        d_state=states,
        sizes=block_sizes(length, own, states, jnp.iscomplexobj(A), x.dtype),
        A=_planes(A),
        B=_planes(B),
        C=_planes(C),
        B_by_token=B.ndim == 4,
        C_by_token=C.ndim == 4,
        packed=runs is not None,
        interpret=interpret,
    )


def _planes(t: jax.Array) -> int:
    return 2 if jnp.iscomplexobj(t) else 1


def _pad(t: jax.Array, after: dict[int, int]) -> jax.Array:
    """Zeros after the end of the axes in ``after``."""
    widths = [(0, 0)] * t.ndim
    for axis, count in after.items():
        widths[axis] = (0, count)
    return jnp.pad(t, widths) if any(after.values()) else t


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan: Plan, x, dt, A, B, C, state, keep):
    return _forward(plan, x, dt, A, B, C, state, keep)[0]


def _forward(plan, x, dt, A, B, C, state, keep):
    arrays = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "state": state}
    arrays |= {} if keep is None else {"keep": keep}
    y, states, final = forward(plan, {name: planes.split(t) for name, t in arrays.items()})
    return (y, planes.join(final)), (x, dt, A, B, C, states, keep)


def _backward(plan, residuals, cotangents):
    x, dt, A, B, C, states, keep = residuals
    dy, d_final = cotangents
    arrays = {"x": x, "dt": dt, "dy": dy, "A": A, "B": B, "C": C, "d_final": d_final}
    arrays |= {} if keep is None else {"keep": keep}
    arrays = {name: planes.split(t) for name, t in arrays.items()} | {"states": states}
    gains = {name: planes.join(planes_) for name, planes_ in backward(plan, arrays).items()}

    def shared(gain: jax.Array, by_token: bool) -> jax.Array:
        if not by_token:
            return jnp.sum(gain, axis=0)
        return jnp.sum(gain.reshape(gain.shape[0], plan.groups, -1, *gain.shape[2:]), axis=2)

    dA = jnp.sum(gains["dA"], axis=0)
    dB, dC = shared(gains["dB"], plan.B_by_token), shared(gains["dC"], plan.C_by_token)
    return gains["dx"], gains["ddt"], dA, dB, dC, gains["d_state"], None


_scan.defvjp(_forward, _backward)

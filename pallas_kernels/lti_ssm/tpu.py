"""LTI state-space recurrences as Pallas kernels for TPU: factors, layouts and the rule of differentiation.

The public layout [B, L, H] becomes the kernels' [H, C*B, Q] by one transposition, which XLA fuses with its
elementwise neighbours. What the kernels make tables of are powers of A up to the eighth, and of A^8: these,
and the gradients of A, B and C from theirs, are XLA's.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.lti_ssm import powers, tables, xla
from pallas_kernels.lti_ssm.compact import compact, permute
from pallas_kernels.lti_ssm.tpu_backward import backward
from pallas_kernels.lti_ssm.tpu_forward import forward
from pallas_kernels.lti_ssm.tpu_plan import (
    MAX_BATCH_STATES,
    MAX_STATES,
    Plan,
    Resets,
    from_rows,
    make_plan,
    resets,
    to_rows,
)
from pallas_kernels.mosaic import LANES, SUBLANES


def lti_ssm(
    u: Float[Array, "B L H"],
    log_A: Complex[Array, "H N"],
    B: Complex[Array, "H N"],
    C: Complex[Array, "H N"],
    initial_state: Complex[Array, "B H N"],
    segment_ids: Int[Array, "B L"] | None,
    *,
    interpret: mosaic.Interpret = False,
) -> tuple[Float[Array, "B L H"], Complex[Array, "B H N"]]:
    """Same contract as ``reference.lti_ssm``, in float32; one token is left to XLA."""
    if u.shape[1] == 1:
        return xla.lti_ssm(u, log_A, B, C, initial_state, segment_ids)
    if segment_ids is None:
        return _contiguous(u, log_A, B, C, initial_state, None, None, interpret)
    places = compact(segment_ids)
    u = permute(u, places.order, places.place)
    y, state = _contiguous(u, log_A, B, C, initial_state, places.start, places.n_real, interpret)
    return permute(y, places.place, places.order), state


def unsupported(u, log_A, B, C, initial_state, segment_ids) -> str | None:
    """Why the kernels cannot take a call; see ``dispatch.Kernel``."""
    for name, t in (("u", u), ("log_A", log_A), ("B", B), ("C", C), ("initial_state", initial_state)):
        if t.dtype not in (jnp.float32, jnp.complex64):
            return f"{name} is {t.dtype}, and TPU kernels compute in float32; cast it to float32 or complex64"
    batch, d_state = u.shape[0], log_A.shape[1]
    if d_state > MAX_STATES:
        return f"N = {d_state} states are above {MAX_STATES}, what fast memory holds; lower N"
    if batch * max(d_state, LANES // 2) > MAX_BATCH_STATES:
        return (
            f"{batch} rows of {d_state} states are above {MAX_BATCH_STATES} states in all, what fast memory "
            "holds; split the batch"
        )
    return None


def _contiguous(u, log_A, B, C, initial_state, start, n_real, interpret):
    """y and the final state; padding only behind the ``n_real`` [B] first tokens, ``start`` as in Compact."""
    plan = make_plan(u.shape, log_A.shape[1], start is not None, interpret)
    length = u.shape[1]
    n_real = jnp.full(u.shape[:1], length, jnp.int32) if n_real is None else n_real
    kernel, factors, jumps = _factors(plan, log_A, B, C)
    state = _to_pairs(plan, initial_state).swapaxes(0, 1)
    arrays = {"u": to_rows(plan, u), "kernel": kernel, "factors": factors, "state": state}
    continues = None
    if plan.tail:
        tail, continues = xla.last_tokens(u, start, n_real, plan.chunk)
        arrays["tail"] = jnp.moveaxis(tail, 2, 0)
    marks = None if start is None else resets(plan, start)
    y, stopped, own = scan(plan, arrays, jumps, n_real // plan.chunk, marks)
    state = _from_pairs(stopped, B.shape[1])
    if continues is not None:
        state = jnp.where(continues[:, None, None], state, 0)
    if own is not None:
        state = powers.advance(log_A, state, n_real % plan.chunk, plan.chunk - 1)
        state += _from_pairs(own, B.shape[1])
    return from_rows(plan, y, length), state


def _factors(plan: Plan, log_A, B, C) -> tuple[jax.Array, jax.Array, jax.Array]:
    """kernel [H, 1, Q], factors and jumps as the kernels want them."""
    steps = [1 << jnp.arange(3), SUBLANES << jnp.arange((plan.tiles - 1).bit_length())]
    steps.append(plan.chunk << jnp.arange(plan.jumps))
    # Few exponentials: sine and cosine of many powers take XLA for TPU half a minute to compile.
    digits = powers.exp_multiple(log_A[:, None], jnp.concatenate(steps)[:, None])
    of_low, of_high, through = jnp.split(digits, [3, digits.shape[1] - plan.jumps], axis=1)
    low, high = _products(of_low), _products(of_high)[:, : plan.tiles]
    write, read = low * B[:, None], low * (C * low[:, 1])[:, None]
    K = jnp.einsum(
        "hms,hrs->hmr", tables.pairs(jnp.conj(high * C[:, None])), tables.pairs(write), precision="highest"
    )
    parts = [_to_pairs(plan, t) for t in (write[:, ::-1], read, high, through)]
    factors = jnp.concatenate([*parts[:3], parts[3][:, :1]], axis=1)
    return K.reshape(plan.heads, 1, -1), factors, jax.lax.stop_gradient(parts[3])


def _products(digits: Complex[Array, "H K N"]) -> Complex[Array, "H M N"]:
    """Entry m < 2^K is the product of the digits k at which m, in binary, has a one."""
    products = jnp.ones((digits.shape[0], 1, digits.shape[2]), digits.dtype)
    for k in range(digits.shape[1]):
        products = jnp.concatenate([products, products * digits[:, k : k + 1]], axis=1)
    return products


def _to_pairs(plan: Plan, z: Complex[Array, "*t N"]) -> Float[Array, "*t S"]:
    widths = [(0, 0)] * (z.ndim - 1) + [(0, plan.d_state // 2 - z.shape[-1])]
    return jnp.concatenate([jnp.pad(z.real, widths), jnp.pad(z.imag, widths)], axis=-1)


def _from_pairs(t: Float[Array, "H B S"], d_state: int) -> Complex[Array, "B H N"]:
    real, imag = (part[..., :d_state] for part in jnp.split(t, 2, axis=-1))
    return jax.lax.complex(real, imag).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(plan: Plan, arrays: dict[str, jax.Array], jumps, stops, marks: Resets | None):
    """y, stopped and own (None without a tail) of ``tpu_forward.forward``; differentiable in ``arrays``."""
    out = forward(plan, arrays | {"jumps": jumps}, stops, marks, save=False)
    return out["y"], out["stopped"], out.get("own")


def _scan_forward(plan, arrays, jumps, stops, marks):
    out = forward(plan, arrays | {"jumps": jumps}, stops, marks, save=True)
    kept = {name: t for name, t in arrays.items() if name != "state"}
    kept |= {"jumps": jumps, "starts": out["starts"]}
    return (out["y"], out["stopped"], out.get("own")), (kept, stops, marks)


def _scan_backward(plan, residuals, cotangents):
    kept, stops, marks = residuals
    given = dict(zip(("dy", "d_stopped", "d_own"), cotangents))
    out = backward(plan, kept | given, stops, marks)
    names = {"u": "du", "kernel": "d_kernel", "factors": "d_factors", "state": "d_state", "tail": "d_tail"}
    gradients = {name: out[gain] for name, gain in names.items() if gain in out}
    return gradients, jnp.zeros_like(kept["jumps"]), None, None


scan.defvjp(_scan_forward, _scan_backward)

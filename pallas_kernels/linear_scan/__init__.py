"""The diagonal linear recurrence of S5, LRU, minGRU and the like, with reset and padding."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int

from pallas_kernels import spmd
from pallas_kernels.dispatch import Kernel, resolve
from pallas_kernels.linear_scan import gpu, reference, sharded, tpu, xla
from pallas_kernels.segments import reset_runs

MAX_ELEMENTS = 2**31 - 1


def _reference(a, b, state, reverse):
    if not reverse:
        return reference.linear_scan(a, b, state)
    h, final = reference.linear_scan(a if a.ndim == 1 else a[:, ::-1], b[:, ::-1], state)
    return h[:, ::-1], final


IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": _reference,
    "xla": xla.linear_scan,
    "pallas_tpu": Kernel(tpu.linear_scan, tpu.unsupported, "tpu", automatic=True),
    "interpret": Kernel(functools.partial(tpu.linear_scan, interpret=True), tpu.unsupported),
    "pallas_gpu": Kernel(gpu.linear_scan, gpu.unsupported, "cuda"),
}


def linear_scan(
    a: Inexact[Array, "B L D"] | Inexact[Array, " D"],
    b: Inexact[Array, "B L D"],
    *,
    initial_state: Inexact[Array, "B D"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "B L D"], Inexact[Array, "B D"]]:
    """h_t = a_t h_{t-1} + b_t, elementwise.

    Args:
        a: decays; [D] where they are the same for every token (an LTI system: faster). b: inputs. Real or
            complex; below float32 they are computed in float32.
        initial_state: state before the first real token, of whose segment it is; zero when None. Complex only
            if ``a`` or ``b`` is.
        segment_ids: 0 is padding: it writes nothing, does not decay, its h is 0, and the state passes it
            unchanged. Any other change of id resets the state (the operator with resets of Lu et al. 2023,
            arXiv:2303.03982). None means no padding and no resets.
        reverse: h_t = a_t h_{t+1} + b_t; the incoming state stands after the last token, the final state is
            that of the first.
        implementation: "reference", "xla", "pallas_tpu", "interpret", or None to choose.

    Under an active mesh (``spmd.active_mesh``) batch is split over (data, fsdp), channels over tensor, time
    over sequence, with one all-gather of (product of a, own final state) a call.

    Returns:
        h [B, L, D] in the common dtype of ``a`` and ``b``; the state after the last real token [B, D] in
        float32 or wider. Both are differentiable in every input.

    Raises:
        ValueError: shapes that do not fit together; 2^31 elements or more on one device; an unknown
            implementation.
    """
    _check(a, b, initial_state, segment_ids)
    run = resolve("linear_scan", implementation, IMPLEMENTATIONS)
    given = jnp.result_type(a, b)
    dtype = jnp.promote_types(given, jnp.float32)
    state = jnp.zeros((b.shape[0], b.shape[2]), dtype) if initial_state is None else initial_state
    dtype = jnp.promote_types(dtype, state.dtype)
    state = state.astype(dtype)

    def local(a, b, state, segment_ids):
        if b.size > MAX_ELEMENTS:
            raise ValueError(
                f"linear_scan: b has {b.size} elements on one device, more than 2^31 - 1. Feed the sequence "
                "in pieces with initial_state, or shard it."
            )
        a, b = a.astype(dtype), b.astype(dtype)
        return run(*_masked(a, b, segment_ids, reverse), state, reverse)

    mesh = spmd.active_mesh()
    if mesh is None:
        h, state = local(a, b, state, segment_ids)
    else:
        h, state = sharded.linear_scan(local, mesh, a, b, state, segment_ids, reverse)
    h = h.astype(given)
    return h if segment_ids is None else jnp.where((segment_ids != 0)[..., None], h, 0), state


def _masked(a: jax.Array, b: jax.Array, segment_ids: jax.Array | None, reverse: bool):
    """Decays that are 1 at padding and 0 at a reset; inputs that are 0 at padding."""
    if segment_ids is None:
        return a, b
    walked = segment_ids[:, ::-1] if reverse else segment_ids
    reset = jnp.diff(reset_runs(walked), axis=1, prepend=0) != 0
    reset = reset[:, ::-1] if reverse else reset
    real = (segment_ids != 0)[..., None]
    return jnp.where(reset[..., None], 0, jnp.where(real, a, 1)), jnp.where(real, b, 0)


def _check(a, b, initial_state, segment_ids) -> None:
    _check_shape("b", b, "[B, L, D]", (None,) * 3)
    batch, length, channels = b.shape
    if length < 1:
        raise ValueError(f"linear_scan: b has shape {b.shape}; expected at least one token (L >= 1).")
    if a.ndim == 1:
        _check_shape("a", a, "[D] of b", (channels,))
    else:
        _check_shape("a", a, "[B, L, D] of b (or [D])", b.shape)
    if initial_state is not None:
        _check_shape("initial_state", initial_state, "[B, D]", (batch, channels))
        if jnp.iscomplexobj(initial_state) and not (jnp.iscomplexobj(a) or jnp.iscomplexobj(b)):
            raise ValueError(
                f"linear_scan: initial_state is {initial_state.dtype}, but a is {a.dtype} and b is "
                f"{b.dtype}; make one of them complex."
            )
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, "[B, L] of b", (batch, length))


def _check_shape(name: str, array: jax.Array, meaning: str, expected: tuple[int | None, ...]) -> None:
    """``None`` in ``expected`` stands for any size."""
    fits = array.ndim == len(expected) and all(e in (None, n) for n, e in zip(array.shape, expected))
    if not fits:
        wanted = tuple("any" if e is None else e for e in expected)
        raise ValueError(f"linear_scan: {name} has shape {array.shape}; expected {meaning} = {wanted}.")

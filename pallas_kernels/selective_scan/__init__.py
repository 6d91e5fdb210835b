"""The selective scan of Mamba-1: a diagonal state of N a channel (Gu & Dao 2023, arXiv:2312.00752)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from pallas_kernels import spmd
from pallas_kernels.dispatch import Kernel, resolve
from pallas_kernels.segments import reset_runs
from pallas_kernels.selective_scan import gpu, reference, sharded, tpu, xla

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": reference.selective_scan,
    "xla": xla.selective_scan,
    "pallas_tpu": Kernel(tpu.selective_scan, tpu.unsupported, "tpu", automatic=True),
    "interpret": Kernel(functools.partial(tpu.selective_scan, interpret=True), tpu.unsupported),
    "pallas_gpu": Kernel(gpu.selective_scan, gpu.unsupported, "cuda"),
}
MAX_ELEMENTS = 2**31 - 1


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Inexact[Array, "E N"],
    B: Inexact[Array, "B L N"] | Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    C: Inexact[Array, "B L N"] | Inexact[Array, "B L G N"] | Inexact[Array, "E N"],
    D: Float[Array, " E"] | None = None,
    *,
    initial_state: Inexact[Array, "B E N"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L E"], Inexact[Array, "B E N"]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t,  y_t = h_t . C_t + D x_t.

    Args:
        x: input. float32, bfloat16 (computed in float32) or float64.
        dt: step sizes, positive (softplus and bias applied).
        A: decay rates, real (negative) or complex (negative real part); then h is complex and
            y_t = 2 Re(h_t . C_t) + D x_t.
        B, C: of every token, of every token and each group of E/G contiguous channels, or constant. Real, or
            complex if A is.
        D: skip, or None.
        initial_state: state before the first real token, of whose segment it is; zero when None.
        segment_ids: 0 is padding: it writes nothing, its output is 0, and the state passes it unchanged.
            Any other change of id resets the state. None means no padding and no resets (and no masks).
        implementation: "reference", "xla", "pallas_tpu", "interpret", or None to choose.

    Under an active mesh (``spmd.active_mesh``) batch is split over (data, fsdp), channels over tensor, time
    over sequence, with one all-gather of (decay, own final state) a call.

    Returns:
        y in the dtype of ``x``; the state after the last real token [B, E, N] in float32 or wider (complex if
        A is). Both are differentiable in every float input.

    Raises:
        ValueError: shapes or dtypes that do not fit together; groups that do not split over the mesh; an
            array of 2^31 elements or more on one device; an unknown implementation.
    """
    _check(x, dt, A, B, C, D, initial_state, segment_ids)
    run = resolve("selective_scan", implementation, IMPLEMENTATIONS)
    real = jnp.promote_types(jnp.result_type(x, dt), jnp.float32)
    dtype = jnp.promote_types(real, A.dtype)
    batch, _, channels = x.shape
    d_state = A.shape[1]
    B, C = (t[:, :, None] if t.ndim == 3 else t for t in (B, C))
    state = jnp.zeros((batch, channels, d_state), dtype) if initial_state is None else initial_state
    dt = dt.astype(real)
    if segment_ids is not None:  # dt = 0: no decay, nothing written
        dt = jnp.where((segment_ids != 0)[..., None], dt, 0)

    def local(x, dt, A, B, C, state, segment_ids):
        _check_size(x, d_state)
        runs = None if segment_ids is None else reset_runs(segment_ids)
        return run(x, dt, A, B, C, state, runs)

    inputs = (x, dt, A.astype(dtype), B, C, state.astype(dtype), segment_ids)
    mesh = spmd.active_mesh()
    y, state = local(*inputs) if mesh is None else sharded.selective_scan(local, mesh, *inputs)
    if D is not None:
        y += D.astype(real) * x
    y = y.astype(x.dtype)
    return y if segment_ids is None else jnp.where((segment_ids != 0)[..., None], y, 0), state


def _check(x, dt, A, B, C, D, initial_state, segment_ids) -> None:
    _check_shape("x", x, "[B, L, E]", (None,) * 3)
    batch, length, channels = x.shape
    if length < 1:
        raise ValueError(f"selective_scan: x has shape {x.shape}; expected at least one token (L >= 1).")
    _check_shape("dt", dt, "[B, L, E] of x", x.shape)
    _check_shape("A", A, "[E, N] with E of x", (channels, None))
    d_state = A.shape[1]
    for name, t in (("B", B), ("C", C)):
        if t.ndim == 2:
            _check_shape(name, t, "[E, N]", (channels, d_state))
        elif t.ndim == 3:
            _check_shape(name, t, "[B, L, N]", (batch, length, d_state))
        else:
            _check_shape(name, t, "[B, L, G, N]", (batch, length, None, d_state))
            if t.shape[2] < 1 or channels % t.shape[2]:
                raise ValueError(
                    f"selective_scan: {name} has {t.shape[2]} groups for {channels} channels; the groups "
                    "must divide the channels."
                )
        if jnp.iscomplexobj(t) and not jnp.iscomplexobj(A):
            raise ValueError(f"selective_scan: {name} is {t.dtype} but A is {A.dtype}; make A complex.")
    if D is not None:
        _check_shape("D", D, "[E] of x", (channels,))
    if initial_state is not None:
        _check_shape("initial_state", initial_state, "[B, E, N]", (batch, channels, d_state))
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, "[B, L] of x", (batch, length))


def _check_shape(name: str, array: jax.Array, meaning: str, expected: tuple[int | None, ...]) -> None:
    """``None`` in ``expected`` stands for any size."""
    fits = array.ndim == len(expected) and all(e in (None, n) for n, e in zip(array.shape, expected))
    if not fits:
        wanted = tuple("any" if e is None else e for e in expected)
        raise ValueError(f"selective_scan: {name} has shape {array.shape}; expected {meaning} = {wanted}.")


def _check_size(x: jax.Array, d_state: int) -> None:
    batch, length, channels = x.shape
    chunk = min(xla.CHUNK, length)
    states = max(-(-length // chunk), chunk) * batch * channels * d_state
    for name, size in (("x", x.size), ("the chunk states", states)):
        if size > MAX_ELEMENTS:
            raise ValueError(
                f"selective_scan: {name} would have {size} elements on one device, more than 2^31 - 1. Feed "
                "the sequence in pieces with initial_state, or shard it."
            )

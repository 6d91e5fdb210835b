"""SSD, the recurrence of Mamba-2: a scalar decay per head (Dao & Gu 2024, arXiv:2405.21060)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import spmd
from pallas_kernels.dispatch import Kernel, resolve
from pallas_kernels.segments import reset_runs
from pallas_kernels.ssd import gpu, reference, sharded, tpu, xla
from pallas_kernels.ssd.unfused import default_chunk, unfused

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": unfused(reference.ssd_core),
    "xla": unfused(xla.ssd_core),
    "pallas_tpu": Kernel(tpu.ssd, tpu.unsupported, "tpu", automatic=True),
    "interpret": Kernel(
        functools.partial(tpu.ssd, interpret=True), functools.partial(tpu.unsupported, interpret=True)
    ),
    "pallas_gpu": Kernel(gpu.ssd, gpu.unsupported, "cuda"),
}
MAX_ELEMENTS = 2**31 - 1


def ssd(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    A: Float[Array, " H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, " H"] | None = None,
    *,
    initial_state: Float[Array, "B H P N"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t + D x_t.

    Args:
        x: input; B, C: input and output projections of each group of H/G contiguous heads. float32, bfloat16
            (products accumulate in float32) or float64.
        dt: step sizes, positive (softplus and bias applied). A: decay rates, negative.
        D: skip, or None.
        initial_state, segment_ids, chunk_size, implementation: see :func:`ssd_core`.

    Returns:
        y in the dtype of ``x``; the final state in float32 or wider.

    Raises:
        ValueError: shapes that do not fit together; an unknown implementation.
    """
    _check_shape("x", x, "[B, L, H, P]", (None,) * 4)
    batch, length, heads, _ = x.shape
    _check_shape("dt", dt, "[B, L, H] of x", (batch, length, heads))
    _check_shape("A", A, "[H] of x", (heads,))
    if D is not None:
        _check_shape("D", D, "[H] of x", (heads,))
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    dt = dt.astype(dtype)
    log_decay = dt * A.astype(dtype)
    return _run(x, dt, log_decay, B, C, D, initial_state, segment_ids, chunk_size, implementation)


def ssd_core(
    u: Float[Array, "B L H P"],
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    *,
    initial_state: Float[Array, "B H P N"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """S_t = exp(log_decay_t) S_{t-1} + u_t B_t^T,  y_t = S_t C_t: SSD with input and decay apart.

    Args:
        u: dt * x. log_decay: dt * A, at most 0; any size below 0 is safe.
        B, C: projections of each group of H/G contiguous heads.
        initial_state: state before the first real token, of whose segment it is; zero when None.
        segment_ids: 0 is padding: it writes nothing, its output is 0, and the state passes it unchanged.
            Any other change of id resets the state. None means no padding and no resets (and no masks).
        chunk_size: tokens worked on at once; changes speed only. None takes what suits the implementation.
        implementation: "reference", "xla", or None to choose.

    Under an active mesh (``spmd.active_mesh``) batch is split over (data, fsdp), heads over tensor, time over
    sequence, with one all-gather of state summaries a call.

    Returns:
        y [B, L, H, P] in the dtype of ``u``; the state after the last real token [B, H, P, N] in float32 or
        wider. Both are differentiable in every float input.

    Raises:
        ValueError: shapes that do not fit together; heads and groups that do not split over the mesh; an
            array of 2^31 elements or more on one device; an unknown implementation.
    """
    return _run(u, None, log_decay, B, C, None, initial_state, segment_ids, chunk_size, implementation)


def _run(x, scale, log_decay, B, C, D, initial_state, segment_ids, chunk_size, implementation):
    """Both ops: u is scale * x, or x itself without a scale; D x is added to y."""
    _check_core(x, log_decay, B, C, initial_state, segment_ids)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}, expected at least 1.")
    run = resolve("ssd", implementation, IMPLEMENTATIONS)

    def local(x, scale, log_decay, B, C, D, state, segment_ids):
        _check_size(x, B, min(chunk_size or default_chunk(B.shape[3]), x.shape[1]))
        runs = None if segment_ids is None else reset_runs(segment_ids)
        return run(x, scale, log_decay, B, C, D, state, runs, chunk_size)

    dtype = jnp.promote_types(jnp.result_type(x, log_decay), jnp.float32)
    batch, _, heads, headdim = x.shape
    state = jnp.zeros((batch, heads, headdim, B.shape[3]), dtype) if initial_state is None else initial_state
    state, log_decay = state.astype(dtype), log_decay.astype(dtype)
    real = None if segment_ids is None else segment_ids != 0
    masked_x = x
    if real is not None:  # a skipped token writes nothing and does not decay
        log_decay = jnp.where(real[..., None], log_decay, 0)
        if scale is None:
            masked_x = jnp.where(real[..., None, None], x, 0)
        else:
            scale = jnp.where(real[..., None], scale, 0)
    mesh = spmd.active_mesh()
    if mesh is None:
        y, state = local(masked_x, scale, log_decay, B, C, D, state, segment_ids)
    else:
        y, state = sharded.ssd(local, mesh, masked_x, scale, log_decay, B, C, D, state, segment_ids)
    return y if real is None else jnp.where(real[..., None, None], y, 0), state


def _check_core(u, log_decay, B, C, initial_state, segment_ids) -> None:
    _check_shape("u (dt * x)", u, "[B, L, H, P]", (None,) * 4)
    batch, length, heads, headdim = u.shape
    if length < 1:
        raise ValueError(f"ssd: u has shape {u.shape}; expected at least one token (L >= 1).")
    _check_shape("log_decay (dt * A)", log_decay, "[B, L, H] of u", (batch, length, heads))
    _check_shape("B", B, "[B, L, G, N] with B, L of u", (batch, length, None, None))
    groups, d_state = B.shape[2:]
    _check_shape("C", C, "the shape of B", (batch, length, groups, d_state))
    if groups < 1 or heads % groups:
        raise ValueError(f"ssd: B has {groups} groups for {heads} heads; the groups must divide the heads.")
    if initial_state is not None:
        _check_shape("initial_state", initial_state, "[B, H, P, N]", (batch, heads, headdim, d_state))
    if segment_ids is not None:
        _check_shape("segment_ids", segment_ids, "[B, L] of u", (batch, length))


def _check_shape(name: str, array: jax.Array, meaning: str, expected: tuple[int | None, ...]) -> None:
    """``None`` in ``expected`` stands for any size."""
    fits = array.ndim == len(expected) and all(e in (None, n) for n, e in zip(array.shape, expected))
    if not fits:
        wanted = tuple("any" if e is None else e for e in expected)
        raise ValueError(f"ssd: {name} has shape {array.shape}; expected {meaning} = {wanted}.")


def _check_size(u: jax.Array, B: jax.Array, chunk: int) -> None:
    batch, length, heads, headdim = u.shape
    states = -(-length // chunk) * batch * heads * headdim * B.shape[3]
    for name, size in (("u", u.size), ("B", B.size), ("the chunk states", states)):
        if size > MAX_ELEMENTS:
            raise ValueError(
                f"ssd: {name} would have {size} elements on one device, more than 2^31 - 1. Feed the "
                "sequence in pieces with initial_state, or shard it; for chunk states, raise chunk_size."
            )

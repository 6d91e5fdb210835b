"""Linear time-invariant state-space recurrences with a state, segments and any length.

The streaming form of S4 (Gu et al. 2022, arXiv:2111.00396), S4D (arXiv:2206.11893) and DSS
(arXiv:2203.14343): what their convolution computes, for carried states, packed documents, decoding and
sharded time. ``lti_ssm`` has diagonal complex dynamics, ``lti_ssm_dense`` any real matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Int

from pallas_kernels import spmd
from pallas_kernels.dispatch import Kernel, resolve
from pallas_kernels.lti_ssm import powers, reference, sharded, tpu, xla

IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": reference.lti_ssm,
    "xla": xla.lti_ssm,
    "pallas_tpu": Kernel(tpu.lti_ssm, tpu.unsupported, "tpu", automatic=True),
    "interpret": Kernel(functools.partial(tpu.lti_ssm, interpret=True), tpu.unsupported),
}
DENSE_IMPLEMENTATIONS: dict[str, Callable | Kernel] = {
    "reference": reference.lti_ssm_dense,
    "xla": xla.lti_ssm_dense,
}
MAX_ELEMENTS = 2**31 - 1


def lti_ssm(
    u: Float[Array, "B L H"],
    log_A: Complex[Array, "H N"],
    B: Complex[Array, "H N"],
    C: Complex[Array, "H N"],
    *,
    initial_state: Complex[Array, "B H N"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H"], Complex[Array, "B H N"]]:
    """x_t = exp(log_A) x_{t-1} + B u_t,  y_t = Re sum_n C_n x_{t,n}.

    ``log_A`` and ``B`` are discrete already. Where a state stands for a conjugate pair the caller puts the
    factor 2 into C.

    Args:
        u: input; float32, bfloat16 (computed in float32) or float64.
        log_A: logarithms of the eigenvalues; a real part above 0 (a growing mode) is allowed. complex64 or
            complex128.
        B, C: input and output vectors.
        initial_state: state before the first real token, of whose segment it is; zero when None.
        segment_ids: 0 is padding: it writes nothing, time stands still there, its output is 0, and the state
            passes it unchanged. Any other change of id resets the state. None means no padding and no resets.
        reverse: run from the last token to the first; then the states are those after the last token and
            before the first.
        implementation: "reference", "xla", "pallas_tpu", "interpret", or None to choose.

    Under an active mesh (``spmd.active_mesh``) batch is split over (data, fsdp), H over tensor, time over
    sequence, with one all-gather of state summaries a call.

    Returns:
        y [B, L, H] in the dtype of ``u``; the state after the last real token [B, H, N] in complex64 or
        wider. Both are differentiable in every float input.

    Raises:
        ValueError: shapes or dtypes that do not fit together; an array of 2^31 elements or more on one
            device; an unknown implementation.
    """
    _check("lti_ssm", u, {"log_A": log_A, "B": B, "C": C}, jnp.complexfloating, initial_state, segment_ids)
    run = resolve("lti_ssm", implementation, IMPLEMENTATIONS)
    return _run("lti_ssm", run, powers.advance, u, (log_A, B, C), initial_state, segment_ids, reverse)


def lti_ssm_dense(
    u: Float[Array, "B L H"],
    A: Float[Array, "H S S"],
    B: Float[Array, "H S"],
    C: Float[Array, "H S"],
    *,
    initial_state: Float[Array, "B H S"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L H"], Float[Array, "B H S"]]:
    """x_t = A x_{t-1} + B u_t,  y_t = C x_t, with any real matrix A for each of H channels.

    For S4, whose transition (diagonal plus low rank) couples a state with its conjugate: half of the
    conjugate pairs, as S = N real numbers. It has no kernels ("reference", "xla"): the powers of A are
    matrices, which a kernel would have to read. Everything else is as in :func:`lti_ssm`.

    Returns:
        y [B, L, H] in the dtype of ``u``; the state after the last real token [B, H, S] in float32 or wider.

    Raises:
        ValueError: as :func:`lti_ssm`.
    """
    _check("lti_ssm_dense", u, {"A": A, "B": B, "C": C}, jnp.floating, initial_state, segment_ids)
    run = resolve("lti_ssm_dense", implementation, DENSE_IMPLEMENTATIONS)
    return _run("lti_ssm_dense", run, powers.advance_dense, u, (A, B, C), initial_state, segment_ids, reverse)


def _run(op: str, run: Callable, advance: Callable, u, parameters, initial_state, segment_ids, reverse: bool):
    """Dtypes, padding and the mesh; ``run`` sees one device's part, in the direction of time."""
    dtype = jnp.result_type(u, *parameters, jnp.float32)
    _, B, _ = parameters = tuple(p.astype(dtype) for p in parameters)
    shape = (u.shape[0], *B.shape)
    state = jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)
    real = None if segment_ids is None else (segment_ids != 0)[..., None]

    def local(u, parameters, state, segment_ids, reverse):
        _check_size(op, u, state)
        if reverse:
            u, segment_ids = (t if t is None else t[:, ::-1] for t in (u, segment_ids))
        y, state = run(u, *parameters, state, segment_ids)
        return y[:, ::-1] if reverse else y, state

    inputs = (u if real is None else jnp.where(real, u, 0)).astype(B.real.dtype)
    mesh = spmd.active_mesh()
    if mesh is None:
        y, state = local(inputs, parameters, state, segment_ids, reverse)
    else:
        y, state = sharded.lti_ssm(local, advance, mesh, inputs, parameters, state, segment_ids, reverse)
    y = y.astype(u.dtype)
    return y if real is None else jnp.where(real, y, 0), state


def _check(op: str, u, parameters: Mapping[str, jax.Array], kind, initial_state, segment_ids) -> None:
    """``parameters``: A or log_A, then B and C; ``kind``: of the numbers that they and the state are."""
    if u.ndim != 3 or u.shape[1] < 1:
        raise ValueError(f"{op}: u has shape {u.shape}; expected [B, L, H] with at least one token (L >= 1).")
    batch, length, heads = u.shape
    d_state = parameters["B"].shape[-1] if parameters["B"].ndim else 0
    matrix = "A" in parameters
    vector = ("[H, S]" if matrix else "[H, N]", (heads, d_state))
    expected: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(parameters, vector)
    if matrix:
        expected["A"] = ("[H, S, S]", (heads, d_state, d_state))
    arrays = dict(parameters)
    if initial_state is not None:
        arrays["initial_state"] = initial_state
        expected["initial_state"] = ("[B, H, S]" if matrix else "[B, H, N]", (batch, heads, d_state))
    for name, array in arrays.items():
        meaning, shape = expected[name]
        if array.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {array.shape}; expected {meaning} = {shape}, with B, H of u and the "
                "state size of B."
            )
        if not jnp.issubdtype(array.dtype, kind):
            wanted = "real" if matrix else "complex"
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; expected a {wanted} one.")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(
            f"{op}: segment_ids has shape {segment_ids.shape}; expected [B, L] of u = {(batch, length)}."
        )


def _check_size(op: str, u: jax.Array, state: jax.Array) -> None:
    chunks = -(-u.shape[1] // xla.CHUNK)
    for name, size in (("u", u.size), ("the chunk states", 2 * chunks * state.size)):
        if size > MAX_ELEMENTS:
            raise ValueError(
                f"{op}: {name} would have {size} elements on one device, more than 2^31 - 1. Feed the "
                "sequence in pieces with initial_state, or shard it."
            )

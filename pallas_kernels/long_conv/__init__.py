"""Convolution of a sequence with a kernel as long as itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import spmd
from pallas_kernels.dispatch import resolve
from pallas_kernels.long_conv import reference, sharded, xla

IMPLEMENTATIONS = {"reference": reference.long_conv, "xla": xla.long_conv}
MAX_ELEMENTS = 2**31 - 1


def long_conv(
    u: Float[Array, "B L H"],
    k: Float[Array, "*sides H K"],
    *,
    skip: Float[Array, " H"] | None = None,
    bidirectional: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B L H"]:
    """y_t = sum_{s<=t} k_{t-s} u_s (+ sum_{s>t} k'_{s-t-1} u_s) (+ skip u_t).

    The second kernel starts at lag one: k' has nothing to say about the current token, as in the code of S4
    (arXiv:2111.00396).

    Args:
        u: inputs; bfloat16 is convolved in float32.
        k: kernel [H, K] of any length K, or the two [2, H, K] when ``bidirectional``; taps beyond L are not
            used, and missing ones are zero.
        skip: weight of the current token.
        implementation: "reference", "xla" (FFT), or None to choose.

    Under an active mesh batch is split over (data, fsdp) and H over tensor; where time is sharded, H is split
    over sequence too while the op runs, with an all-to-all of u and one of y. A recurrence that has the same
    kernel sends less: ``lti_ssm``.

    Returns:
        y in the dtype of ``u``; differentiable in every float input.

    Raises:
        ValueError: shapes that do not fit together; an FFT of 2^31 elements or more on one device; an
            unknown implementation.
    """
    _check(u, k, skip, bidirectional)
    dtype = jnp.promote_types(jnp.result_type(u, k), jnp.float32)
    run = resolve("long_conv", implementation, IMPLEMENTATIONS)
    forward, backward = (k[0], k[1]) if bidirectional else (k, None)

    def local(u: jax.Array, forward: jax.Array, backward: jax.Array | None) -> jax.Array:
        elements = u.size // u.shape[1] * xla.fast_size(u.shape[1] + min(u.shape[1], k.shape[-1]))
        if elements > MAX_ELEMENTS:
            raise ValueError(
                f"long_conv: the padded sequences would have {elements} elements on one device, more than "
                "2^31 - 1; use a smaller batch, or shard it or H."
            )
        cast = [None if t is None else t.astype(dtype) for t in (u, forward, backward)]
        return run(*cast).astype(u.dtype)

    mesh = spmd.active_mesh()
    run_local = local if mesh is None else functools.partial(sharded.long_conv, local, mesh)
    y = run_local(u, forward, backward)
    return y if skip is None else y + (skip.astype(dtype) * u).astype(y.dtype)


def _check(u: jax.Array, k: jax.Array, skip: jax.Array | None, bidirectional: bool) -> None:
    if u.ndim != 3 or u.shape[1] < 1:
        raise ValueError(f"long_conv: u has shape {u.shape}; expected [B, L, H] with L >= 1.")
    heads = u.shape[2]
    expected = (2, heads) if bidirectional else (heads,)
    if k.ndim != len(expected) + 1 or k.shape[:-1] != expected or k.shape[-1] < 1:
        meaning = "[2, H, K] (bidirectional: one kernel a side)" if bidirectional else "[H, K]"
        raise ValueError(
            f"long_conv: k has shape {k.shape}; expected {meaning} with K >= 1 and H = {heads} of u."
        )
    if skip is not None and skip.shape != (heads,):
        raise ValueError(f"long_conv: skip has shape {skip.shape}; expected [H] = ({heads},) of u.")

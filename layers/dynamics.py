"""What a recurrent mixer does to its state, laid open for who asks how it forgets.

A selective mixer (Mamba) has dynamics that depend on its input, a time-invariant one (S4, S4D, DSS, S5) a
spectrum and a response to an impulse. Both are read from the code that runs the layer.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Complex, Float

from layers.types import Context, State
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd


class Dynamics(NamedTuple):
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t, for each head.

    Mamba-2 has one decay rate a head: M = 1. In Mamba-1 every channel is a head, with P = 1 and M = N.

    Attributes:
        x: input [B, L, H, P].
        dt: step sizes [B, L, H], 0 at padding.
        A: decay rates [H, M], negative (0 for a state that never decays).
        B, C: projections of each group of H / G heads [B, L, G, N].
    """

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array


@runtime_checkable
class Selective(Protocol):
    """A mixer whose dynamics depend on what it reads."""

    def dynamics(self, x: Float[Array, "B L D"], state: State | None, ctx: Context) -> Dynamics:
        """The dynamics at each token of ``x``, after ``state``."""


@runtime_checkable
class TimeInvariant(Protocol):
    """A mixer whose dynamics are the same at every token."""

    def log_eigenvalues(self) -> Complex[Array, "H N"]:
        """Logarithms of the eigenvalues of the step from token to token, outside ``jit``."""

    def response(self, length: int) -> Float[Array, "H L"]:
        """Size of the response to an impulse, by how many tokens ago it was."""


def read_out(dynamics: Dynamics) -> Float[Array, "B L H P"]:
    """y_t from an empty state, without the skip D x."""
    x, dt, A, B, C = dynamics
    if A.shape[1] == 1:
        return ssd(x, dt, A[:, 0], B, C)[0]
    return selective_scan(x[..., 0], dt, A, B, C)[0][..., None]

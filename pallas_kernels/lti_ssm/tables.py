"""What a chunk of Q tokens needs of a state-space system, as tables made once a call.

States are real inside: [H, B, S], with S = 2N for a diagonal system (real parts, then imaginary parts), so
that both kinds of system are read and written by the same real matrix products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from pallas_kernels.lti_ssm import powers


@dataclasses.dataclass(frozen=True)
class Tables:
    """Tables of one system for chunks of Q tokens.

    Attributes:
        kernel: C A^l B for l < Q, [H, Q].
        write: A^(Q-1-l) B, what token l of a chunk has become at its end, [H, Q, S].
        read: C A^(l+1), what token l of a chunk sees of the state before the chunk, [H, Q, S].
        through: state [H, B, S] -> A^Q state.
        advance: (state [H, B, S], steps [B] < Q) -> A^steps state.
    """

    kernel: Float[Array, "H Q"]
    write: Float[Array, "H Q S"]
    read: Float[Array, "H Q S"]
    through: Callable[[jax.Array], jax.Array]
    advance: Callable[[jax.Array, jax.Array], jax.Array]


def to_pairs(state: Complex[Array, "B H N"]) -> Float[Array, "H B S"]:
    """Real parts of the N states, then imaginary ones: S = 2 N."""
    return pairs(state).swapaxes(0, 1)


def from_pairs(state: Float[Array, "H B S"]) -> Complex[Array, "B H N"]:
    """Back from :func:`to_pairs`."""
    return jax.lax.complex(*jnp.split(state, 2, axis=-1)).swapaxes(0, 1)


def diagonal(
    log_A: Complex[Array, "H N"], B: Complex[Array, "H N"], C: Complex[Array, "H N"], chunk: int
) -> Tables:
    """x_t = exp(log_A) x_{t-1} + B u_t,  y_t = Re sum_n C_n x_n. ``chunk`` is a power of two."""
    write, read = _diagonal_tables(log_A, B, C, chunk)
    power = powers.exp_multiple(log_A, jnp.array(chunk))[:, None]

    def through(state):
        real, imag = jnp.split(state, 2, axis=-1)
        moved = (power.real * real - power.imag * imag, power.real * imag + power.imag * real)
        return jnp.concatenate(moved, axis=-1)

    def advance(state, steps):
        return to_pairs(powers.advance(log_A, from_pairs(state), steps, chunk - 1))

    return Tables(_kernel(pairs(jnp.conj(C)), write), write, read, through, advance)


def _diagonal_tables(log_A, B, C, chunk: int) -> tuple[jax.Array, jax.Array]:
    """``write`` and ``read`` as products of A^l and A^(block m): few exponentials."""
    block = min(8, chunk)
    low = powers.exp_multiple(log_A[:, None], jnp.arange(block)[:, None])
    high = powers.exp_multiple(log_A, jnp.arange(0, chunk, block)[:, None, None])
    low_write, low_read = low[:, ::-1] * B[:, None], low * (C * jnp.exp(log_A))[:, None]

    # In a loop, because XLA for CPU would fuse the exponentials into the products and compute them anew, in
    # scalar code, for each entry of the tables: seven times slower.
    def one_block(power):  # [H, block, S]
        return pairs(power[:, None] * low_write), pairs(jnp.conj(power[:, None] * low_read))

    write, read = jax.lax.map(one_block, high)
    return _join(write[::-1]), _join(read)


def _join(blocks: Float[Array, "M H T S"]) -> Float[Array, "H Q S"]:
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1, blocks.shape[3])


def _kernel(C: Float[Array, "H S"], write: Float[Array, "H Q S"]) -> Float[Array, "H Q"]:
    return jnp.einsum("hs,hls->hl", C, write, precision="highest")[:, ::-1]


def pairs(z: Complex[Array, "*H N"]) -> Float[Array, "*H S"]:
    """Re(z x) is the product of the pairs of conj(z) with those of x."""
    return jnp.concatenate([z.real, z.imag], axis=-1)


def dense(A: Float[Array, "H S S"], B: Float[Array, "H S"], C: Float[Array, "H S"], chunk: int) -> Tables:
    """x_t = A x_{t-1} + B u_t,  y_t = C x_t. By doubling: ``chunk`` is a power of two."""
    write, power = B[:, None], A
    read = jnp.einsum("hs,hst->ht", C, A, precision="highest")[:, None]
    while write.shape[1] < chunk:
        later = jnp.einsum("hst,hlt->hls", power, write, precision="highest")
        write = jnp.concatenate([later, write], axis=1)
        later = jnp.einsum("hls,hst->hlt", read, power, precision="highest")
        read = jnp.concatenate([read, later], axis=1)
        power = jnp.matmul(power, power, precision="highest")

    def through(state):
        return jnp.einsum("hst,hbt->hbs", power, state, precision="highest")

    def advance(state, steps):
        moved = powers.advance_dense(A, state.swapaxes(0, 1), steps, chunk - 1)
        return moved.swapaxes(0, 1)

    return Tables(_kernel(C, write), write, read, through, advance)

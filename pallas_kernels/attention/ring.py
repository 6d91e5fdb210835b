"""Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values travel, queries stay.

Runs inside ``shard_map``. Every device passes the keys it holds to its right neighbour, n - 1 times in the
forward pass; results are merged by their log-sum-exps. The backward sends keys, values and their gradients
around and recomputes the probabilities. A device holds O(L/n) keys whatever the length; positions are known
from the device that keys come from, and segment ids, 4 bytes a token, are whole on every device: what travels
is one array. Tiles that the mask rules out (the future, beyond the window) are not computed.

In contiguous order a causal mask leaves device 0 waiting in every step but one while the last device computes
in all; in zigzag order (``time_order``) all have the same number of tiles to compute, in every step. A window
ends the journey early; in zigzag order the keys then take another way (``zigzag.py``).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import time_order
from pallas_kernels.attention import blockwise
from pallas_kernels.attention.sources import MASKED, Alibi, Source, Tokens, may_meet, wide
from pallas_kernels.attention.xla import Spec
from pallas_kernels.attention.zigzag import Path


@dataclasses.dataclass(frozen=True)
class Ring:
    """The mesh axis, its size, how often the keys move on, and in how many pieces a device has them."""

    axis: str
    size: int
    rotations: int
    pieces: int

    def send(self, x: Array) -> Array:
        """Every device's ``x`` goes to its right neighbour."""
        return self._shift(x, 1)

    def home(self, x: Array) -> Array:
        """Back by all rotations at once."""
        return self._shift(x, -self.rotations)

    def tokens(self, whole: Tokens, positional: bool, step: Array | int, length: int) -> Tokens:
        """Those of the ``length`` keys that a device holds after ``step`` rotations.

        Positions that are not given are indices in time.
        """
        device = (jax.lax.axis_index(self.axis) - step) % self.size

        def part(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, device * length, length, axis=1)

        own = jax.tree.map(part, whole)
        if not positional or own.positions is not None:
            return own
        return own._replace(positions=time_order.row_index(device, length, self.size, self.pieces)[None])

    def _shift(self, x: Array, by: int) -> Array:
        pairs = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.lax.ppermute(x, self.axis, pairs)


def attend(
    axis: str,
    size: int,
    pieces: int,
    q: Float[Array, "B Lq H E"],
    source: Source,
    kv_tokens: Tokens,
    q_segment_ids: Int[Array, "B Lq"] | None,
    scale: float,
    bias: Alibi | None,
    implementation: str | None,
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"]]:
    """Attention of this device's queries over the keys of all devices: float32 output and log-sum-exp.

    Args:
        axis, size: the mesh axis and its number of devices.
        pieces: of time on each device (``time_order``), for queries and for keys of the same length; keys of
            another length are in contiguous order.
        source: this device's keys, values and query positions.
        kv_tokens: positions, or None for indices in time, and segment ids of the keys of all devices.
    """
    mask, length = source.mask, q.shape[1]
    spec = Spec(mask, scale, aligned=False, out_dtype=wide(q), implementation=implementation)
    positional = mask.positional or bias is not None
    q_positions = source.q_positions if positional else None
    if positional and q_positions is None:
        q_positions = time_order.row_index(jax.lax.axis_index(axis), length, size, pieces)[None]
    kv_tokens = kv_tokens if positional else kv_tokens._replace(positions=None)
    slopes = None if bias is None else jax.lax.stop_gradient(bias.slopes)

    aligned = source.q_positions is None and kv_tokens.positions is None and length == source.k.shape[1]
    steps = size - 1
    if aligned and mask.causal and mask.window is not None:
        reach = -(-(mask.window - 1) * pieces // length)
        if pieces == 2 and reach < steps:
            path = Path(axis, size, reach, q.shape[0])
            assert q_positions is not None
            q_tokens = Tokens(jnp.repeat(q_positions, q.shape[0], axis=0), q_segment_ids)
            split = functools.partial(time_order.split, pieces=pieces)
            given = jax.tree.map(split, (q, source.k, source.v, q_tokens))
            out, lse = _attend(spec, path, *given, kv_tokens, slopes)
            return time_order.join(out, pieces), time_order.join(lse.swapaxes(1, 2), pieces).swapaxes(1, 2)
        steps = min(steps, reach) if pieces == 1 else steps
    ring = Ring(axis, size, steps, pieces if length == source.k.shape[1] else 1)
    return _attend(spec, ring, q, source.k, source.v, Tokens(q_positions, q_segment_ids), kv_tokens, slopes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec, ring, q, k, v, q_tokens, kv_tokens, slopes):
    return _forward(spec, ring, q, k, v, q_tokens, kv_tokens, slopes)


def _attend_fwd(spec, ring, *given):
    out, lse = _forward(spec, ring, *given)
    return (out, lse), (*given, out.astype(given[0].dtype), lse)


def _attend_bwd(spec, ring, residuals, cotangents):
    q, k, v, q_tokens, kv_tokens, slopes, out, lse = residuals
    d_out, d_lse = cotangents
    delta = blockwise.row_delta(out, d_out, d_lse)
    dq, dk, dv = _backward(spec, ring, q, k, v, q_tokens, kv_tokens, slopes, lse, d_out, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(spec, ring: Ring | Path, q, k, v, q_tokens, kv_tokens, slopes):
    def add(step, packed, so_far):
        """The share of the keys that arrived after ``step`` rotations."""
        tokens = _arrived(ring, step, q_tokens, kv_tokens, packed.shape[1])
        k, v = jnp.split(packed, 2, axis=-1)

        def share(out, lse):
            return blockwise.merge(out, lse, *blockwise.forward(spec, q, k, v, q_tokens, tokens, slopes))

        return jax.lax.cond(_meet(spec, q_tokens, tokens), share, lambda *so_far: so_far, *so_far)

    def step(i, carry):
        packed, so_far = carry
        return ring.send(packed), add(i, packed, so_far)  # independent of each other: they overlap

    lse = jnp.full((q.shape[0], q.shape[2], q.shape[1]), MASKED, wide(q, k))
    start = (jnp.concatenate([k, v], axis=-1), (jnp.zeros(q.shape, lse.dtype), lse))
    packed, so_far = jax.lax.fori_loop(0, ring.rotations, step, start)
    return add(ring.rotations, packed, so_far)


def _backward(
    spec, ring: Ring | Path, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes, lse, d_out, delta
):
    def add(step, packed, sums):
        tokens = _arrived(ring, step, q_tokens, kv_tokens, packed.shape[1])
        k, v = jnp.split(packed, 2, axis=-1)

        def share(dq, d_packed):
            dq_part, dk, dv = blockwise.backward(spec, q, k, v, q_tokens, tokens, slopes, lse, d_out, delta)
            return dq + dq_part, d_packed + jnp.concatenate([dk, dv], axis=-1)

        return jax.lax.cond(_meet(spec, q_tokens, tokens), share, lambda *sums: sums, *sums)

    def step(i, carry):
        packed, sums = carry
        dq, d_packed = add(i, packed, sums)
        return ring.send(packed), (dq, ring.send(d_packed))

    packed = jnp.concatenate([k, v], axis=-1)
    start = (packed, tuple(jnp.zeros(x.shape, lse.dtype) for x in (q, packed)))
    packed, sums = jax.lax.fori_loop(0, ring.rotations, step, start)
    dq, d_packed = add(ring.rotations, packed, sums)
    return dq, *jnp.split(ring.home(d_packed), 2, axis=-1)


def _arrived(ring: Ring | Path, step, q_tokens: Tokens, kv_tokens: Tokens, length: int) -> Tokens:
    """The key tokens that a device holds after ``step`` rotations."""
    return ring.tokens(kv_tokens, q_tokens.positions is not None, step, length)


def _meet(spec: Spec, q_tokens: Tokens, kv_tokens: Tokens) -> Array:
    """Whether any of this device's queries sees any of these keys."""
    blocks = (jax.tree.map(lambda x: x[:, None], tokens) for tokens in (q_tokens, kv_tokens))
    return may_meet(spec.mask, *blocks).any()

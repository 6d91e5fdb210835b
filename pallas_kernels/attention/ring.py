"""Ring attention (Liu et al. 2023, arXiv 2310.01889): keys and values travel, queries stay.

Runs inside ``shard_map``. Every device holds one contiguous block of time and passes the block of keys it
holds to its right neighbour, n - 1 times in the forward pass; results are merged by their log-sum-exps. The
backward sends keys, values and their gradients around and recomputes the probabilities. A device holds O(L/n)
whatever the length. Blocks that the mask rules out (the future, beyond the window) are not computed; a window
also ends the journey early.

The layout of time enters in :func:`_row_index` only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import xla
from pallas_kernels.attention.sources import MASKED, Alibi, Source, Tokens, may_meet, wide


@dataclasses.dataclass(frozen=True)
class Ring:
    """The mesh axis, its size, and how often the keys move on."""

    axis: str
    size: int
    rotations: int

    def send(self, tree: Any, by: int = 1) -> Any:
        """Every device's ``tree`` goes ``by`` places to the right."""
        pairs = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

    def source_of(self, step: Array | int) -> Array:
        """Whose keys a device holds after ``step`` rotations."""
        return (jax.lax.axis_index(self.axis) - step) % self.size


def attend(
    axis: str,
    size: int,
    q: Float[Array, "B Lq H E"],
    source: Source,
    q_segment_ids: Int[Array, "B Lq"] | None,
    scale: float,
    bias: Alibi | None,
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"]]:
    """Attention of this device's queries over the keys of all devices: float32 output and log-sum-exp."""
    spec, q_tokens, kv_tokens = xla.describe(q.shape[1], source, q_segment_ids, scale, bias, wide(q))
    rotations, mask, keys = size - 1, source.mask, source.k.shape[1]
    if spec.aligned and mask.causal and mask.window is not None and q.shape[1] == keys:
        rotations = min(rotations, -(-(mask.window - 1) // keys))
    ring = Ring(axis, size, rotations)
    spec = dataclasses.replace(spec, aligned=False)
    if q_tokens.positions is not None and source.q_positions is None:
        q_tokens = q_tokens._replace(positions=_row_index(ring.source_of(0), q.shape[1]))
    if source.kv_positions is None:
        kv_tokens = kv_tokens._replace(positions=None)  # known from the device the keys come from
    slopes = None if bias is None else jax.lax.stop_gradient(bias.slopes)
    return _attend(spec, ring, q, source.k, source.v, q_tokens, kv_tokens, slopes)


def _row_index(device: Array, length: int) -> Int[Array, "1 L"]:
    """Row index of the tokens that ``device`` holds."""
    return (device * length + jnp.arange(length, dtype=jnp.int32))[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec, ring, q, k, v, q_tokens, kv_tokens, slopes):
    return _forward(spec, ring, q, k, v, q_tokens, kv_tokens, slopes)


def _attend_fwd(spec, ring, *given):
    out, lse = _forward(spec, ring, *given)
    return (out, lse), (*given, out.astype(given[0].dtype), lse)


def _attend_bwd(spec, ring, residuals, cotangents):
    q, k, v, q_tokens, kv_tokens, slopes, out, lse = residuals
    d_out, d_lse = cotangents
    delta = xla.row_delta(out, d_out, d_lse)
    dq, dk, dv = _backward(spec, ring, q, k, v, q_tokens, kv_tokens, slopes, lse, d_out, delta)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(spec, ring: Ring, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes):
    def add(step, kv, so_far):
        """The share of the keys that arrived after ``step`` rotations."""
        packed, tokens = kv
        tokens = _placed(ring, step, tokens, q_tokens, packed.shape[1])
        k, v = jnp.split(packed, 2, axis=-1)

        def share(out, lse):
            return xla.merge(out, lse, *xla.forward(spec, q, k, v, q_tokens, tokens, slopes))

        return jax.lax.cond(_meet(spec, q_tokens, tokens), share, lambda *so_far: so_far, *so_far)

    def step(i, carry):
        kv, so_far = carry
        return ring.send(kv), add(i, kv, so_far)  # independent of each other: they overlap

    lse = jnp.full((q.shape[0], q.shape[2], q.shape[1]), MASKED, wide(q, k))
    start = ((jnp.concatenate([k, v], axis=-1), kv_tokens), (jnp.zeros(q.shape, lse.dtype), lse))
    kv, so_far = jax.lax.fori_loop(0, ring.rotations, step, start)
    return add(ring.rotations, kv, so_far)


def _backward(spec, ring: Ring, q, k, v, q_tokens: Tokens, kv_tokens: Tokens, slopes, lse, d_out, delta):
    def add(step, kv, sums):
        packed, tokens = kv
        tokens = _placed(ring, step, tokens, q_tokens, packed.shape[1])
        k, v = jnp.split(packed, 2, axis=-1)

        def share(dq, d_packed):
            dq_part, dk, dv = xla.backward(spec, q, k, v, q_tokens, tokens, slopes, lse, d_out, delta)
            return dq + dq_part, d_packed + jnp.concatenate([dk, dv], axis=-1)

        return jax.lax.cond(_meet(spec, q_tokens, tokens), share, lambda *sums: sums, *sums)

    def step(i, carry):
        kv, sums = carry
        dq, d_packed = add(i, kv, sums)
        return ring.send(kv), (dq, ring.send(d_packed))

    packed = jnp.concatenate([k, v], axis=-1)
    start = ((packed, kv_tokens), tuple(jnp.zeros(x.shape, lse.dtype) for x in (q, packed)))
    kv, sums = jax.lax.fori_loop(0, ring.rotations, step, start)
    dq, d_packed = add(ring.rotations, kv, sums)
    return dq, *jnp.split(ring.send(d_packed, by=-ring.rotations), 2, axis=-1)


def _placed(ring: Ring, step, tokens: Tokens, q_tokens: Tokens, length: int) -> Tokens:
    """Key tokens with their positions, which travel only if they are not the row index."""
    if q_tokens.positions is None or tokens.positions is not None:
        return tokens
    return tokens._replace(positions=_row_index(ring.source_of(step), length))


def _meet(spec: xla.Spec, q_tokens: Tokens, kv_tokens: Tokens) -> Array:
    """Whether any of this device's queries sees any of these keys."""
    blocks = (jax.tree.map(lambda x: x[:, None], tokens) for tokens in (q_tokens, kv_tokens))
    return may_meet(spec.mask, *blocks).any()

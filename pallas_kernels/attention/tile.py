"""The mathematics of one tile: a block of queries against a block of keys.

Queries are laid out as rows [B, K, R, E], R = G * l: the G heads that share a key head are stacked, so that
every product is a plain batched matrix product. Letters: l queries of the block, m keys of the block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.sources import MASKED, Mask, Tokens, visible, wide

FEW_ROWS = 64  # query rows over all heads up to which the keys are read in place


class Keys(NamedTuple):
    """A block of keys and values [B, m, K, E] and what masks need to know about them."""

    k: Float[Array, "B m K E"]
    v: Float[Array, "B m K E"]
    tokens: Tokens


class Scoring(NamedTuple):
    """Logit of a pair: ``scale * q.k - slope * distance`` where the mask lets it through."""

    mask: Mask
    scale: float
    slopes: Float[Array, " H"] | None


class Partial(NamedTuple):
    """A softmax before normalisation: maxima and sums of the rows, values weighted by exp(logit - top)."""

    top: Float[Array, "B K R"]
    total: Float[Array, "B K R"]
    values: Float[Array, "B K R E"]

    @classmethod
    def empty(cls, q: Float[Array, "B l H E"], k: Float[Array, "B Lk K E"]) -> Partial:
        """Over no keys at all."""
        zeros = jnp.zeros(to_rows(q, k.shape[2]).shape, wide(q, k))
        return cls(zeros[..., 0] + MASKED, zeros[..., 0], zeros)

    def join(self, other: Partial) -> Partial:
        """Over both sets of keys (the online softmax)."""
        top = jnp.maximum(self.top, other.top)
        a, b = jnp.exp(self.top - top), jnp.exp(other.top - top)
        values = a[..., None] * self.values + b[..., None] * other.values
        return Partial(top, a * self.total + b * other.total, values)

    def finish(self, length: int) -> tuple[Float[Array, "B l H E"], Float[Array, "B H l"]]:
        """Output and log-sum-exp in float32; rows that saw nothing give 0 and MASKED."""
        some = self.total > 0
        total = jnp.where(some, self.total, 1.0)
        lse = jnp.where(some, self.top + jnp.log(total), MASKED)
        out = from_rows(self.values / total[..., None], length)
        return out, lse.reshape(lse.shape[0], -1, length)


def to_rows(x: Float[Array, "B l H E"], kv_heads: int) -> Float[Array, "B K R E"]:
    """Heads grouped by their key head, a row for each head of a group and query."""
    batch, length, heads, width = x.shape
    grouped = x.reshape(batch, length, kv_heads, heads // kv_heads, width)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)


def from_rows(x: Float[Array, "B K R E"], length: int) -> Float[Array, "B l H E"]:
    """Inverse of :func:`to_rows` for ``length`` queries."""
    batch, kv_heads, _, width = x.shape
    grouped = x.reshape(batch, kv_heads, -1, length, width)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, width)


def softmax_part(q: Float[Array, "B l H E"], q_tokens: Tokens, keys: Keys, scoring: Scoring) -> Partial:
    """The tile's share of the softmax."""
    s = _logits(to_rows(q, keys.k.shape[2]), q.shape[1], q_tokens, keys, scoring)
    top = jnp.maximum(s.max(-1), MASKED)
    p = jnp.exp(s - top[..., None])
    return Partial(top, p.sum(-1), _weighted_sum(p.astype(keys.v.dtype), keys.v))


def gradients(
    q: Float[Array, "B l H E"],
    d_out: Float[Array, "B l H E"],
    lse: Float[Array, "B H l"],
    delta: Float[Array, "B H l"],
    q_tokens: Tokens,
    keys: Keys,
    scoring: Scoring,
) -> tuple[Float[Array, "B l H E"], Float[Array, "B m K E"], Float[Array, "B m K E"]]:
    """The tile's share of dq, dk, dv in float32.

    With P = exp(S - lse) over all keys, dS = P * (dP - delta), where ``delta`` is the row sum of
    d_out * out minus the cotangent of the log-sum-exp.
    """
    kv_heads = keys.k.shape[2]
    rows, d_rows = to_rows(q, kv_heads), to_rows(d_out.astype(keys.v.dtype), kv_heads)
    lse, delta = (x.reshape(*rows.shape[:3], 1) for x in (lse, delta))
    p = jnp.exp(_logits(rows, q.shape[1], q_tokens, keys, scoring) - lse)
    ds = (p * (_scores(d_rows, keys.v) - delta) * scoring.scale).astype(q.dtype)
    dk = _product("bkrm,bkre->bmke", ds, rows)
    dv = _product("bkrm,bkre->bmke", p.astype(d_rows.dtype), d_rows)
    return from_rows(_weighted_sum(ds, keys.k), q.shape[1]), dk, dv


def _logits(rows: Array, length: int, q_tokens: Tokens, keys: Keys, scoring: Scoring) -> Array:
    """Float32 logits [B, K, R, m], -inf where the query does not see the key."""
    s = _scores(rows, keys.k) * scoring.scale
    shape = s.shape
    s = s.reshape(*shape[:2], -1, length, shape[3])
    if scoring.slopes is not None:
        assert q_tokens.positions is not None and keys.tokens.positions is not None
        distance = q_tokens.positions[:, :, None] - keys.tokens.positions[:, None]
        s -= scoring.slopes.reshape(shape[1], -1, 1, 1) * distance[:, None, None]
    seen = visible(scoring.mask, q_tokens, keys.tokens)
    return (s if seen is None else jnp.where(seen[:, None, None], s, -jnp.inf)).reshape(shape)


def _scores(rows: Float[Array, "B K R E"], k: Float[Array, "B m K E"]) -> Float[Array, "B K R m"]:
    """Products of every row with every key of its head."""
    batch, kv_heads, n_rows, width = rows.shape
    if not _read_in_place(rows):
        return _product("bkre,bmke->bkrm", rows, k)
    # Zeros at the other key heads make one product over all heads: the cache is read once, not transposed.
    wide = jnp.einsum("bkre,kj->bkrje", rows, jnp.eye(kv_heads, dtype=rows.dtype))
    s = _product("bxf,bmf->bxm", wide.reshape(batch, -1, kv_heads * width), k.reshape(*k.shape[:2], -1))
    return s.reshape(batch, kv_heads, n_rows, -1)


def _weighted_sum(p: Float[Array, "B K R m"], v: Float[Array, "B m K E"]) -> Float[Array, "B K R E"]:
    """Sum over keys of weight times value."""
    batch, kv_heads, n_rows, _ = p.shape
    if not _read_in_place(p):
        return _product("bkrm,bmke->bkre", p, v)
    wide = _product("bxm,bmf->bxf", p.reshape(batch, kv_heads * n_rows, -1), v.reshape(*v.shape[:2], -1))
    return jnp.einsum("bkrke->bkre", wide.reshape(batch, kv_heads, n_rows, kv_heads, -1))


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=wide(a, b))


def _read_in_place(rows: Array) -> bool:
    return rows.shape[1] > 1 and math.prod(rows.shape[1:3]) <= FEW_ROWS

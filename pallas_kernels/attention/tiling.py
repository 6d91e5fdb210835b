"""How [Lq, Lk] is cut into tiles, and which tiles matter."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.attention.sources import Mask, Tokens, may_meet
from pallas_kernels.attention.tile import Keys


@dataclasses.dataclass(frozen=True)
class Tiling:
    """N blocks of ``rows`` queries; block i needs the blocks ``low[i] <= j < high[i]`` of ``cols`` keys.

    Queries are filled up to whole blocks. Keys are not, which would copy a cache: the last block is moved
    back to end with the keys, and the keys that it shares with the block before do not count again.
    """

    rows: int
    cols: int
    q_length: int
    kv_length: int
    low: Int[Array, " N"]
    high: Int[Array, " N"]

    @classmethod
    def of(
        cls,
        mask: Mask,
        block: tuple[int, int],
        q_length: int,
        kv_length: int,
        q_tokens: Tokens,
        kv_tokens: Tokens,
    ) -> Tiling:
        """Tiles of ``block`` = (rows, cols), neither longer than what it cuts."""
        rows, cols = block
        n_rows, n_cols = -(-q_length // rows), -(-kv_length // cols)
        needed = may_meet(mask, _blocks(q_tokens, rows), _blocks(kv_tokens, cols)).any(0)
        needed = jnp.broadcast_to(needed, (n_rows, n_cols))
        some = needed.any(1)
        low = jnp.where(some, needed.argmax(1), 0).astype(jnp.int32)
        high = jnp.where(some, n_cols - needed[:, ::-1].argmax(1), 0).astype(jnp.int32)
        return cls(rows, cols, q_length, kv_length, low, high)

    def split(self, x: Array, axis: int, fill: float = 0.0) -> Array:
        """Blocks of queries in front: [.., Lq, ..] to [N, .., rows, ..], filled up with ``fill``."""
        missing = [(0, -self.q_length % self.rows if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, missing, constant_values=fill)
        x = x.reshape(*x.shape[:axis], -1, self.rows, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def split_tokens(self, tokens: Tokens) -> Tokens:
        """:meth:`split` of every field."""
        return jax.tree.map(lambda x: self.split(x, 1), tokens)

    def join(self, x: Array, axis: int) -> Array:
        """Inverse of :meth:`split`."""
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, self.q_length, axis=axis)

    def keys(self, k: Array, v: Array, tokens: Tokens, j: Array) -> Keys:
        """Key block j."""
        start = self._start(j)

        def take(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, self.cols, axis=1)

        tokens = jax.tree.map(take, tokens)
        if self.kv_length % self.cols:
            new = (start + jnp.arange(self.cols) >= j * self.cols)[None]
            tokens = tokens._replace(valid=new if tokens.valid is None else tokens.valid & new)
        return Keys(take(k), take(v), tokens)

    def add(self, total: Array, part: Array, j: Array) -> Array:
        """``total`` [B, Lk, ..] with ``part`` [B, cols, ..] added at key block j."""
        start = self._start(j)
        old = jax.lax.dynamic_slice_in_dim(total, start, self.cols, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=1)

    def _start(self, j: Array) -> Array:
        return jnp.minimum(j * self.cols, self.kv_length - self.cols)


def _blocks(tokens: Tokens, size: int) -> Tokens:
    """Every field cut into blocks, [B, N, size]; the last token repeated fills up the last one."""

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)), mode="edge")
        return x.reshape(x.shape[0], -1, size)

    return jax.tree.map(cut, tokens)

"""Token embedding, optionally with learned positions; ``attend`` is the tied output head."""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from layers.param import Initializer, normal, param
from pallas_kernels import spmd


class Embedding(nnx.Module):
    """``scale * table[tokens] (+ position_table[positions])``.

    The table is sharded along its features only.

    Args:
        vocab_size, d_model: V and D.
        max_positions: number of learned positions, or None for none.
        scale: of the looked-up rows; the tied head does without.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        max_positions: int | None = None,
        init: Initializer | None = None,
        scale: float = 1.0,
    ):
        self.scale = scale
        init = init or normal(0.02)
        self.table = param(init(rngs.params(), (vocab_size, d_model)), ("vocab", "embed"), "embedding")
        positions = init(rngs.params(), (max_positions or 0, d_model))
        axes = ("positions", "embed")
        self.positions = None if max_positions is None else param(positions, axes, "embedding/position")

    def __call__(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], dtype: DTypeLike
    ) -> Float[Array, "B L D"]:
        return self.at(self.lookup(tokens, dtype), positions)

    def lookup(self, tokens: Int[Array, "*b"], dtype: DTypeLike) -> Float[Array, "*b D"]:
        """``scale * table[tokens]``."""
        # Gathered like any other sharded weight; looked up in a split table, activations would be gathered.
        rows = spmd.replicate(self.table[...].astype(dtype))[tokens]
        return rows if self.scale == 1 else self.scale * rows

    def at(self, x: Float[Array, "B L D"], positions: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """``x``, of :meth:`lookup` or not, with the learned positions added, if there are any."""
        if self.positions is None:
            return x
        return x + spmd.replicate(self.positions[...].astype(x.dtype))[positions]

    def attend(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Logits of the tied head, in the dtype of ``x``."""
        return x @ self.table[...].astype(x.dtype).T

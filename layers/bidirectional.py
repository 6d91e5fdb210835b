"""Two copies of a causal mixer, one of which reads from the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from layers.types import Context, SequenceMixer, State
from pallas_kernels import time_order


class Bidirectional(nnx.Module):
    """``forward(x) + reverse(backward(reverse(x)))``: an encoder layer out of any causal mixer.

    ``build(rngs)`` makes one mixer; the two have parameters of their own. It has no state.
    """

    causal = False

    def __init__(self, build: Callable[[nnx.Rngs], Any], *, rngs: nnx.Rngs):
        self.forward, self.backward = build(rngs), build(rngs)

    def init_state(self, batch: int, max_len: int) -> State:
        """Raises ValueError: a layer that reads from the end cannot stream."""
        raise ValueError("a bidirectional layer cannot stream, it has no state")

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], None]:
        if state is not None:
            raise ValueError("a bidirectional layer takes no state")
        layout = ctx.sequence_layout
        ahead, _ = self.forward(x, None, ctx)
        back, _ = self.backward(time_order.reverse(x, layout), None, _reversed(ctx))
        return ahead + time_order.reverse(back, layout), None

    def flops_per_token(self, length: int) -> float:
        """Those of both copies."""
        mixer: SequenceMixer = self.forward
        return 2 * mixer.flops_per_token(length)


def _reversed(ctx: Context) -> Context:
    """The context of the same tokens, last first; each document counts its positions from its end."""
    layout, ids = ctx.sequence_layout, ctx.segment_ids
    if ids is not None:
        ids = time_order.restore(ids, layout)[:, ::-1]
    key = None if ctx.key is None else jax.random.fold_in(ctx.key, 1)
    new = Context.create(*ctx.positions.shape, segment_ids=ids)
    return dataclasses.replace(
        new.arranged(layout),
        key=key,
        deterministic=ctx.deterministic,
        sequence_axis=ctx.sequence_axis,
    )

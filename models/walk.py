"""A language model taken apart: its sub-layers one after another, with all that goes in and out of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from layers.types import Context, State
from models import pattern as patterns
from models.backbone import SubLayer
from models.lm import LM
from models.registry import KINDS


class Visit(NamedTuple):
    """One sub-layer at work.

    Attributes:
        depth: number of the sub-layer, from 0.
        kind: the field of its config, such as "mamba2".
        mixer: with its own parameters.
        x: the residual stream before it [B, L, D].
        inner: what the mixer reads [B, L, D], the norm of ``x``.
        y: what it adds to the residual stream [B, L, D].
        before, after: its state; None where none is carried.
        ctx: what else it is told.
    """

    depth: int
    kind: str
    mixer: Any
    x: jax.Array
    inner: jax.Array
    y: jax.Array
    before: State | None
    after: State | None
    ctx: Context

    @property
    def out(self) -> jax.Array:
        """The residual stream after it [B, L, D]."""
        return self.x + self.y.astype(self.x.dtype)

    @property
    def name(self) -> str:
        """Such as "layer 3 (mamba2)"."""
        return layer_name(self.depth, self.kind)


def layer_name(depth: int, kind: str) -> str:
    """Such as "layer 3 (mamba2)"."""
    return f"layer {depth} ({kind})"


def is_plain(model: Any) -> bool:
    """Whether :func:`walk` computes what ``model`` does: a language model without a memory around it, that
    reads all tokens in all layers."""
    return isinstance(model, LM) and type(model).__call__ is LM.__call__ and not model.config.decimate.layers


def sub_layers(lm: LM) -> list[tuple[str, SubLayer]]:
    """Every sub-layer with its kind, each with its own parameters (or shapes) out of the stacked runs."""
    found: list[tuple[str, SubLayer]] = []
    for (unit, repeats), run in zip(patterns.runs(lm.config.layers), lm.backbone.runs):
        for i in range(repeats):
            layers = run.layers if repeats == 1 else jax.tree.map(lambda t, i=i: _at(t, i), run.layers)
            found += [(KINDS[symbol].field, layer) for symbol, layer in zip(unit, layers)]
    return found


def _at(stacked: jax.Array | jax.ShapeDtypeStruct, i: int) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(stacked, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype)
    return stacked[i]


def init_states(lm: LM, batch: int, max_len: int) -> list[State]:
    """The empty state of every sub-layer, in their order."""
    return [layer.mixer.init_state(batch, max_len) for _, layer in sub_layers(lm)]


def embed(lm: LM, tokens: Int[Array, "B L"], ctx: Context) -> Float[Array, "B L D"]:
    """The residual stream before the first sub-layer."""
    x = lm.embed(tokens, ctx.positions, jnp.dtype(lm.config.dtype))
    return x.astype(lm.config.residual_dtype)


def walk(
    lm: LM, x: Float[Array, "B L D"], ctx: Context, states: Sequence[State] | None = None
) -> Iterator[Visit]:
    """Visit every sub-layer, from the embedded tokens ``x`` on; what nobody reads is not computed in ``jit``.

    Args:
        states: of every sub-layer, from :func:`init_states` or the visits of the piece before; None carries
            nothing.
    """
    dtype = jnp.dtype(lm.config.dtype)
    for depth, (kind, layer) in enumerate(sub_layers(lm)):
        before = None if states is None else states[depth]
        inner = layer.norm(x, dtype=dtype)
        y, after = layer.mixer(inner, before, ctx)
        visit = Visit(depth, kind, layer.mixer, x, inner, layer.scaled(y), before, after, ctx)
        yield visit
        x = visit.out


def final_norm(lm: LM, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """The hidden states that the head reads, from the residual stream after the last sub-layer."""
    return lm.norm(x, dtype=jnp.dtype(lm.config.dtype))

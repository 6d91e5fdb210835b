"""DeciMamba (arXiv:2406.14528): a backbone in which prompts become shorter from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from layers.decimation import DecimateConfig
from layers.state_limits import take
from layers.types import Context
from models.backbone import Backbone, SubLayer


def read(
    backbone: Backbone, config: DecimateConfig, x: Float[Array, "B L D"], states: Sequence[Any], ctx: Context
) -> tuple[Float[Array, "B L D"], list[Any] | None, Bool[Array, "B L"]]:
    """As ``backbone(x, states, ctx)``, decimated; and which tokens went through all layers.

    The residual stream of dropped tokens is zero. Their convolution tails are those of all tokens up to the
    layer that dropped them.
    """
    batch, length, _ = x.shape
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    after: list[list[list[Any]]] = []
    index = 0
    for run, run_states in zip(backbone.runs, states):
        after.append([])
        for repeat in range(run.repeats):
            layers = run.layers
            if run.repeats > 1:
                layers = jax.tree.map(lambda t, i=repeat: t[i], layers)
            after[-1].append([])
            for layer, state in zip(layers, run_states[repeat]):
                keep = x.shape[1]
                if index in config.layers:
                    keep = config.keep(config.layers.index(index), max(keep - config.tail, 0))
                if keep + config.tail < x.shape[1]:
                    x, state, ctx, chosen = _decimated(layer, x, state, ctx, keep, config.tail)
                    places = take(places, chosen)
                else:
                    x, state = layer(x, state, ctx)
                after[-1][-1].append(state)
                index += 1
    rows = jnp.arange(batch)[:, None]
    whole = jnp.zeros((batch, length, x.shape[2]), x.dtype).at[rows, places].set(x)
    return whole, after, jnp.zeros((batch, length), bool).at[rows, places].set(True)


def _decimated(layer: SubLayer, x: Array, state: Any, ctx: Context, keep: int, tail: int) -> tuple:
    """``layer(x, state, ctx)`` on the tokens it keeps, their context, and their places."""
    inner = layer.norm(x, dtype=jnp.dtype(layer.dtype))
    y, state, places = layer.mixer.decimated(inner, state, ctx, keep, tail)
    x = take(x, places)
    return x + layer.scaled(y.astype(x.dtype)), state, ctx.take(places), places

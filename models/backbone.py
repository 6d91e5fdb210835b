"""A stack of pre-norm residual sub-layers given by a pattern; repeated runs are stacked and scanned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.norm import NORMS
from layers.param import Initializer, normal, uniform_fan_in
from layers.types import Context, State
from models import pattern as patterns
from models.config import ClassifierConfig, LMConfig
from models.registry import KINDS, Kind
from pallas_kernels import spmd, time_order

# What the backward pass recomputes, one sub-layer at a time. "none" keeps every intermediate, "dots" keeps
# the results of matmuls with weights, "full" keeps the residual stream only.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


# Runs of at most this many repeats are unrolled. A scan compiles its unit once, but copies what the backward
# pass keeps into and out of stacked arrays: 15 % of a training step on CPU.
UNROLLED = 4


class SubLayer(nnx.Module):
    """``x + scale mixer(norm(x))``, scale 1 unless ``config.residual_scale`` says otherwise."""

    def __init__(self, symbol: str, config: LMConfig, *, rngs: nnx.Rngs, kinds: Mapping[str, Kind] = KINDS):
        kind = kinds[symbol]
        self.dtype, self.scale = config.dtype, config.residual_scale
        self.norm = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        init, out_init = initializers(config)
        self.mixer = kind.module(
            config.d_model, getattr(config, kind.field), rngs=rngs, init=init, out_init=out_init
        )

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        y, state = self.mixer(self.norm(x, dtype=jnp.dtype(self.dtype)), state, ctx)
        return spmd.shard_activations(x + self.scaled(y.astype(x.dtype))), state

    def scaled(self, y: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """What is added to the residual stream when the mixer gives ``y``."""
        return y if self.scale == 1 else self.scale * y


def initializers(config: LMConfig | ClassifierConfig) -> tuple[Initializer, Initializer]:
    """Initialisers of inner and of residual-writing projections; the latter are scaled by 1/sqrt(depth).

    ``init_std`` None takes torch's Linear default as the Mamba code does (mixer_seq_simple.py).
    """
    init = uniform_fan_in if config.init_std is None else normal(config.init_std)
    scale = len(config.layers) ** -0.5 if config.rescale_residual else 1.0
    return init, lambda key, shape, dtype=jnp.float32: scale * init(key, shape, dtype)


class Run(nnx.Module):
    """``repeats`` copies of a unit of sub-layers; stacked on a leading "layers" axis if several.

    More than ``UNROLLED`` are scanned.
    """

    def __init__(
        self,
        unit: str,
        repeats: int,
        config: LMConfig,
        *,
        rngs: nnx.Rngs,
        kinds: Mapping[str, Kind] = KINDS,
    ):
        self.repeats, self.remat = repeats, config.remat
        self.apart: nnx.List = nnx.List([])  # see `take_apart`

        def build(rngs: nnx.Rngs) -> nnx.List:
            return nnx.List([SubLayer(symbol, config, rngs=rngs, kinds=kinds) for symbol in unit])

        if repeats == 1:
            self.layers = build(rngs)
        else:
            stacked = nnx.vmap(build, transform_metadata={nnx.PARTITION_NAME: "layers"})
            self.layers = nnx.split_rngs(splits=repeats)(stacked)(rngs)

    def init_state(self, batch: int, max_len: int) -> list[list[State]]:
        """A state for each sub-layer of each repeat, lying apart: so one token updates them in place."""
        return [
            [layer.mixer.init_state(batch, max_len) for layer in self.layers] for _ in range(self.repeats)
        ]

    def __call__(
        self, x: Float[Array, "B L D"], states: Sequence[Any] | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], list[Any] | None]:
        # One token at a time is never scanned: that would copy every state into and out of a stacked array.
        scanned = self.repeats > UNROLLED and (states is None or x.shape[1] > 1)

        def unit(x: jax.Array, layers: Any, states: Any) -> tuple[jax.Array, list[State]]:
            after = []
            for layer, state in zip(layers, states or [None] * len(layers)):
                call = lambda layer, x, state, ctx: layer(x, state, ctx)  # noqa: E731
                if self.remat != "none" and states is None:
                    call = jax.checkpoint(call, policy=REMAT_POLICIES[self.remat], prevent_cse=not scanned)
                x, state = call(layer, x, state, ctx)
                after.append(state)
            return x, after

        if scanned:
            stacked = None if states is None else jax.tree.map(lambda *t: jnp.stack(t), *states)
            x, stacked = jax.lax.scan(lambda x, xs: unit(x, *xs), x, (self.layers, stacked))
            return x, None if states is None else [_at(stacked, i) for i in range(self.repeats)]
        after = []
        for i in range(self.repeats):
            layers = (
                self.layers if self.repeats == 1 else self.apart[i] if self.apart else _at(self.layers, i)
            )
            x, part = unit(x, layers, None if states is None else states[i])
            after.append(part)
        return x, None if states is None else after

    def take_apart(self) -> None:
        """Slice what is stacked before a loop over tokens: within it, every token would copy the weights."""
        if self.repeats > 1:
            self.apart = nnx.List([_at(self.layers, i) for i in range(self.repeats)])


def _at(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda t: t[i], stacked)


class Backbone(nnx.Module):
    """The runs of ``config.layers`` one after another; state: of each run, of each repeat, of each sub-layer.

    ``kinds``: what its symbols stand for.
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs, kinds: Mapping[str, Kind] = KINDS):
        runs = patterns.runs(config.layers)
        self.runs = nnx.List([Run(unit, n, config, rngs=rngs, kinds=kinds) for unit, n in runs])

    def init_state(self, batch: int, max_len: int) -> list[list[list[State]]]:
        """Of each run, of each repeat, of each sub-layer."""
        return [run.init_state(batch, max_len) for run in self.runs]

    def __call__(
        self, x: Float[Array, "B L D"], state: Sequence[Any] | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], list[Any] | None]:
        after = []
        with time_order.use(ctx.sequence_layout):
            for i, run in enumerate(self.runs):
                x, run_state = run(x, None if state is None else state[i], ctx)
                after.append(run_state)
        return x, None if state is None else after

    def take_apart(self) -> list[nnx.List]:
        """For a loop over tokens, before it (`Run.take_apart`); of a model that is bound to parameters.

        What it returns, :meth:`put_apart` gives to a model that is bound to them anew.
        """
        for run in self.runs:
            run.take_apart()
        return [run.apart for run in self.runs]

    def put_apart(self, apart: Sequence[nnx.List]) -> None:
        """As if taken apart here."""
        for run, layers in zip(self.runs, apart, strict=True):
            run.apart = layers

    def flops_per_token(self, length: int) -> float:
        """Forward operations per token of all mixers and MLPs at context ``length``."""
        return math.fsum(
            run.repeats * layer.mixer.flops_per_token(length) for run in self.runs for layer in run.layers
        )

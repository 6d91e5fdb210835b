"""The model that every peer runs, from the same weights, on the same tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from layers.mamba2 import Mamba2Config
from models.config import LMConfig
from models.functional import Functional
from models.lm import LM

Weights = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A pure Mamba-2 language model with tied embeddings, one group of B and C, all in float32.

    ``chunk_size`` is that of the peers (256 is the published default); longspan chooses its own.
    """

    vocab_size: int = 256
    d_model: int = 256
    n_layers: int = 2
    expand: int = 2
    headdim: int = 64
    d_state: int = 128
    d_conv: int = 4
    chunk_size: int = 256
    norm_eps: float = 1e-5
    batch: int = 1

    @property
    def d_inner(self) -> int:
        """Channels of a layer."""
        return self.expand * self.d_model

    @property
    def heads(self) -> int:
        """H."""
        return self.d_inner // self.headdim

    def config(self) -> LMConfig:
        """The same model here."""
        mamba2 = Mamba2Config(
            d_state=self.d_state,
            headdim=self.headdim,
            expand=self.expand,
            d_conv=self.d_conv,
            norm_eps=self.norm_eps,
        )
        return LMConfig(
            vocab_size=self.vocab_size,
            vocab_multiple=1,
            d_model=self.d_model,
            pattern="M" * self.n_layers,
            mamba2=mamba2,
            norm_eps=self.norm_eps,
        )


@functools.cache
def build(shape: Shape) -> tuple[Functional, Any]:
    """Our model and its parameters; the same on every call."""
    config = shape.config()
    model = Functional.create(lambda rngs: LM(config, rngs=rngs))
    return model, jax.jit(model.init)(jax.random.key(0))


def published_weights(shape: Shape) -> Weights:
    """The parameters of :func:`build` in the published layout: torch's [out, in], rows z | x | B | C | dt.

    Keys: "embedding" [V, D], "norm" [D], and for each layer "0.norm", "0.in_proj", "0.conv_weight" [C, K],
    "0.conv_bias", "0.dt_bias", "0.A_log", "0.D", "0.gate_norm", "0.out_proj".
    """
    params = jax.tree.map(np.asarray, build(shape)[1])
    (layer,) = params["backbone"]["runs"][0]["layers"].values()
    weights = {"embedding": params["embed"]["table"], "norm": params["norm"]["scale"]}
    for i in range(shape.n_layers):
        one = jax.tree.map(lambda p, i=i: p[i] if shape.n_layers > 1 else p, layer)
        mixer = one["mixer"]
        conv = [mixer["conv"][name] for name in ("x", "B", "C")]
        projections = [mixer[f"in_{name}"]["kernel"] for name in ("z", "x", "B", "C", "dt")]
        named = {
            "norm": one["norm"]["scale"],
            "in_proj": np.concatenate(projections, axis=1).T,
            "conv_weight": np.concatenate([c["weight"] for c in conv], axis=1).T,
            "conv_bias": np.concatenate([c["bias"] for c in conv]),
            "gate_norm": mixer["norm"]["scale"],
            "out_proj": mixer["out"]["kernel"].T,
        }
        named |= {name: mixer[name] for name in ("dt_bias", "A_log", "D")}
        weights |= {f"{i}.{name}": value for name, value in named.items()}
    return {name: np.ascontiguousarray(value) for name, value in weights.items()}


def random_tokens(shape: Shape, length: int) -> Int[np.ndarray, "B L"]:
    """The same ids for every peer."""
    rng = np.random.default_rng(length)
    return rng.integers(shape.vocab_size, size=(shape.batch, length), dtype=np.int32)

"""The position-wise MLP: GELU, SwiGLU, ReLU or its square, biases optional."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from layers.param import Initializer, Linear, uniform_fan_in
from layers.types import Context

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # GPT-2's "gelu_new"
    "relu": jax.nn.relu,  # OPT
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # Nemotron-H
    "swiglu": jax.nn.silu,  # gated: silu(gate) * up
}


@dataclasses.dataclass
class MLPConfig:
    """``hidden`` None means 4 d_model (8/3 d_model rounded up to a multiple of 64 for "swiglu")."""

    hidden: int | None = None
    activation: str = "swiglu"
    use_bias: bool = False

    def width(self, d_model: int) -> int:
        """Of the hidden layer."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * d_model // (3 * 64)) * 64 if self.activation == "swiglu" else 4 * d_model


class MLP(nnx.Module):
    """``down(act(up(x)))``, or ``down(silu(gate(x)) * up(x))`` for "swiglu".

    It takes and returns a state (always None) so that it stands in a pattern beside the mixers.

    Raises:
        ValueError: unknown ``activation``.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        config: MLPConfig,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        if config.activation not in ACTIVATIONS:
            raise ValueError(
                f"mlp.activation={config.activation!r} is unknown; use one of {sorted(ACTIVATIONS)}"
            )
        self.activation = config.activation
        self.features = (d_model, config.width(d_model))
        inner, outer, bias = ("embed", "mlp"), ("mlp", "embed"), config.use_bias
        hidden = config.width(d_model)
        gated = config.activation == "swiglu"
        self.up = Linear(d_model, hidden, inner, rngs=rngs, use_bias=bias, init=init)
        self.gate = Linear(d_model, hidden, inner, rngs=rngs, use_bias=bias, init=init) if gated else None
        self.down = Linear(hidden, d_model, outer, rngs=rngs, use_bias=bias, init=out_init or init)

    def init_state(self, batch: int, max_len: int) -> None:
        """An MLP remembers nothing."""

    def __call__(
        self, x: Float[Array, "B L D"], state: None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], None]:
        act = ACTIVATIONS[self.activation]
        h = self.up(x)
        h = act(h) if self.gate is None else act(self.gate(x)) * h
        return self.down(h), None

    def flops_per_token(self, length: int) -> float:
        """Two products, three with a gate."""
        d_model, hidden = self.features
        return 2.0 * d_model * hidden * (2 if self.gate is None else 3)

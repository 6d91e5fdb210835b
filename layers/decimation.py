"""DeciMamba (arXiv:2406.14528): which tokens of a prompt the layers after this one still read."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass
class DecimateConfig:
    """Layers after which only the tokens that matter most to them go on, where a prompt is read.

    A prompt is a piece of several tokens with a state; training and decoding are not affected. Each piece is
    decimated by itself, so a prompt should come in one; several rows keep equally many tokens each.

    Attributes:
        layers: sub-layers of the pattern, counted from 0, that decimate; all Mamba or Mamba-2. () for none.
        base: tokens that the first of them keeps, beside the tail.
        beta: factor from each to the next.
        minimum: tokens that all keep at least.
        tail: last tokens of the prompt that are always kept: the question, and where the answer begins.
    """

    layers: tuple[int, ...] = ()
    base: int = 2000
    beta: float = 0.5
    minimum: int = 20
    tail: int = 16

    def keep(self, stage: int, length: int) -> int:
        """Of ``length`` tokens that may be dropped, how many the ``stage``-th of the layers keeps."""
        return int(min(max(min(length, self.base * self.beta**stage), self.minimum), length))

    def validate(self, kinds: str) -> None:
        """Raises ValueError unless the layers are sub-layers of ``kinds``, the pattern, that can decimate."""
        for layer in self.layers:
            if not 0 <= layer < len(kinds) or kinds[layer] not in "Mm":
                can = [i for i, kind in enumerate(kinds) if kind in "Mm"]
                raise ValueError(
                    f"model.decimate.layers={self.layers}: sub-layer {layer} of {kinds!r} is no Mamba or "
                    f"Mamba-2; those are {can}"
                )
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"model.decimate.layers={self.layers} should rise")
        for field, least in (("base", 1), ("minimum", 0), ("tail", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"model.decimate.{field}={getattr(self, field)} should be at least {least}")
        if not 0 < self.beta <= 1:
            raise ValueError(f"model.decimate.beta={self.beta} should lie in (0, 1]")


def importance(dt: Float[Array, "B L H"]) -> Float[Array, "B L"]:
    """Norm of a token's step sizes: how much of it is written, and of the past forgotten."""
    return jnp.sqrt(jnp.sum(jnp.square(dt), axis=-1))


def kept_places(
    score: Float[Array, "B L"], keep: int, tail: int, segment_ids: Int[Array, "B L"] | None = None
) -> Int[Array, "B K"]:
    """Where the last ``tail`` real tokens of each row stand, and the ``keep`` others that score highest.

    In the order of time; K = min(keep + tail, L). A row with fewer real tokens keeps padding too.
    """
    real = jnp.ones(score.shape, bool) if segment_ids is None else segment_ids != 0
    after = jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1]  # real tokens from here on
    score = jnp.where(after <= tail, jnp.inf, score)
    score = jnp.where(real, score, -jnp.inf)
    _, places = jax.lax.top_k(score, min(keep + tail, score.shape[1]))
    return jnp.sort(places, axis=1).astype(jnp.int32)

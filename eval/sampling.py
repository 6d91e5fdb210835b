"""Choosing the next token from logits, row by row, so that a row's tokens do not depend on its batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; filters are applied in the order of the fields, as transformers does.

    Attributes:
        repetition_penalty: logits of ids already in the row are divided by this where positive, multiplied
            where negative (arXiv:1909.05858, section 4.1); 1 for none.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep this many of the most likely; 0 for all.
        top_p: keep the fewest whose probabilities add up to this (arXiv:1904.09751); 1 for all.
        min_p: keep those at least this share as likely as the most likely (arXiv:2407.01082); 0 for all.
        seed: of the draws. Equal prompts in one batch get different draws, a prompt alone the first of them.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "repetition_penalty": (self.repetition_penalty > 0, "positive"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p < 1, "at least 0 and below 1"),
        }
        for name, (fits, wanted) in ranges.items():
            if not fits:
                raise ValueError(f"sampling: {name}={getattr(self, name)} should be {wanted}")


def row_keys(seed: int, prompts: Sequence[Hashable]) -> Key[Array, " B"]:
    """A key for each row: the n-th occurrence of a prompt has the n-th key, wherever it stands."""
    seen: dict[Hashable, int] = {}
    numbers = []
    for prompt in prompts:
        numbers.append(seen.get(prompt, 0))
        seen[prompt] = numbers[-1] + 1
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.array(numbers, jnp.uint32))


def pick(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    step: Int[Array, ""],
    seen: Bool[Array, "B V"] | None,
    sampling: Sampling,
) -> Int[Array, " B"]:
    """The next id of every row, int32.

    Args:
        keys: one per row, see :func:`row_keys`.
        step: number of tokens drawn before; the draw is a function of (key, step).
        seen: ids that occur in the row so far; None without a repetition penalty.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _filtered(logits / sampling.temperature, sampling)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits with -inf at what the filters leave out; the most likely id always stays."""
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        ordered = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered  # probability of all that are more likely
        keep = jnp.take_along_axis(before < sampling.top_p, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(keep, logits, -jnp.inf)
    if sampling.min_p > 0:
        best = logits.max(axis=-1, keepdims=True)
        logits = jnp.where(logits < best + jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits

"""Rotary position embedding and its length-extension variants (Su et al. 2021, arXiv 2104.09864).

``x[i]`` and ``x[i + e/2]`` are rotated by ``position * inv_freq[i]`` (half-split convention), computed in
float32 or wider. Checked against transformers' implementation.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")


@dataclasses.dataclass
class RopeConfig:
    """Rotation frequencies.

    Attributes:
        theta: base of the frequencies ``theta ** (-2 i / e)``.
        fraction: share of the head dim, from its start, that is rotated.
        scaling: how a model trained on ``original_max_position`` tokens is stretched by ``factor``. "linear"
            divides all frequencies (Chen et al. 2023, arXiv 2306.15595), "ntk" raises the base, "yarn"
            divides the slow ones (Peng et al. 2023, arXiv 2309.00071), "llama3" likewise with other limits.
        factor: stretch, >= 1.
        original_max_position: trained length; for "yarn" and "llama3", and "ntk" of a given length.
        beta_fast, beta_slow: "yarn": rotations within the trained length above which a frequency is kept, and
            below which it is divided.
        attention_factor: "yarn": multiplies cos and sin; ``0.1 ln(factor) + 1`` when None.
        low_freq_factor, high_freq_factor: "llama3": the same two limits, as trained length / wavelength.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: str = "none"
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


def rotary_dim(config: RopeConfig, head_dim: int) -> int:
    """Number of leading dimensions of a head that are rotated.

    Raises:
        ValueError: it is odd or outside 2..head_dim.
    """
    dim = int(head_dim * config.fraction)
    if dim % 2 or not 2 <= dim <= head_dim:
        raise ValueError(
            f"rope: head_dim {head_dim} * fraction {config.fraction} rotates {dim} dimensions; "
            f"use an even number in 2..{head_dim}."
        )
    return dim


def rope_frequencies(
    config: RopeConfig, head_dim: int, length: int | None = None
) -> tuple[Float[np.ndarray, " F"], float]:
    """Angles per position, float32 [rotary_dim / 2], and the factor on cos and sin.

    Args:
        config, head_dim: what to rotate.
        length: "ntk" only: the base grows with this sequence length beyond the trained one ("dynamic NTK").
            None takes ``factor`` as it is, which keeps rotated keys in a cache valid.

    Raises:
        ValueError: unknown scaling, a missing ``original_max_position``, or an odd rotary dimension.
    """
    dim = rotary_dim(config, head_dim)
    trained, factor = config.original_max_position or 0, config.factor
    if not trained and (config.scaling in ("yarn", "llama3") or (config.scaling == "ntk" and length)):
        raise ValueError(f"rope: scaling={config.scaling!r} needs original_max_position, the trained length.")
    plain = config.theta ** (-np.arange(0, dim, 2) / dim)
    attention_factor = 1.0
    if config.scaling == "none":
        inv_freq = plain
    elif config.scaling == "linear":
        inv_freq = plain / factor
    elif config.scaling == "ntk":
        stretch = factor if length is None else factor * max(length, trained) / trained - (factor - 1)
        base = config.theta * stretch ** (dim / (dim - 2))
        inv_freq = base ** (-np.arange(0, dim, 2) / dim)
    elif config.scaling == "yarn":
        divide = _yarn_ramp(config, dim, trained)
        inv_freq = plain / factor * divide + plain * (1 - divide)
        default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        attention_factor = default if config.attention_factor is None else config.attention_factor
    elif config.scaling == "llama3":
        rotations = trained * plain / (2 * math.pi)
        span = config.high_freq_factor - config.low_freq_factor
        keep = np.clip((rotations - config.low_freq_factor) / span, 0, 1)
        inv_freq = plain / factor * (1 - keep) + plain * keep
    else:
        raise ValueError(f"rope: scaling={config.scaling!r} does not exist; use one of {SCALINGS}.")
    return inv_freq.astype(np.float32), attention_factor


def _yarn_ramp(config: RopeConfig, dim: int, trained: int) -> np.ndarray:
    """Share of each frequency that is divided: 0 for the fast ones, 1 for the slow ones."""

    def index_of(rotations: float) -> float:
        return dim * math.log(trained / (2 * math.pi * rotations)) / (2 * math.log(config.theta))

    low = max(math.floor(index_of(config.beta_fast)), 0)
    high = min(math.ceil(index_of(config.beta_slow)), dim - 1)
    return np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)


def apply_rope(
    x: Float[Array, "B L H E"], positions: Int[Array, "B L"], config: RopeConfig
) -> Float[Array, "B L H E"]:
    """``x`` rotated by ``positions``; the dtype is kept."""
    inv_freq, factor = rope_frequencies(config, x.shape[-1])
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    angle = positions[..., None, None].astype(dtype) * inv_freq
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    half = inv_freq.shape[0]
    a, b, rest = jnp.split(x.astype(dtype), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)

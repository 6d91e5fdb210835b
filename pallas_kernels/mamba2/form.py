"""What goes into the op of a Mamba-2 layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax

ConvWeights = tuple[jax.Array, jax.Array | None]  # taps [K, C], bias [C]


class Inputs(NamedTuple):
    """The projections of a layer's input, raw: E = H * P channels, G groups of N states.

    z [B, L, E] gates; x [B, L, E], B [B, L, G*N] and C [B, L, G*N] go through the convolution; dt [B, L, H]
    is before softplus and bias.
    """

    z: jax.Array
    x: jax.Array
    B: jax.Array
    C: jax.Array
    dt: jax.Array


class Weights(NamedTuple):
    """``conv``: taps and bias by name, "x", "B", "C". dt_bias, A (negative), D: [H]. norm: [E] or None."""

    conv: Mapping[str, ConvWeights]
    dt_bias: jax.Array
    A: jax.Array
    D: jax.Array
    norm: jax.Array | None


class Form(NamedTuple):
    """What is static: n_groups G, of B and C and of the norm; the clamp on dt; the norm; tokens a chunk."""

    n_groups: int
    dt_limit: tuple[float, float] = (0.0, math.inf)
    norm_eps: float = 1e-5
    norm_before_gate: bool = False
    chunk_size: int | None = None

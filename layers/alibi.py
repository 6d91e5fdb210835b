"""Slopes of attention with linear biases (Press et al. 2021, arXiv 2108.12409)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " H"]:
    """Slope of each head: ``2 ** (-8 h / H)`` for h = 1..H when H is a power of two.

    Otherwise the slopes of the largest power of two p below H, then every other slope of those of 2 p.
    """

    def geometric(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    power = 2 ** (num_heads.bit_length() - 1)
    extra = geometric(2 * power)[::2][: num_heads - power]
    return np.concatenate([geometric(power), extra]).astype(np.float32)

"""LongMamba (arXiv:2504.16053): what a state must not be filled with, left out by its step size.

Channels (heads, in Mamba-2) that still remember the start of a text of the training length are global. Read
far beyond that length they see more step sizes than ever in training; tokens with small ones are skipped
(dt = 0: nothing decays, nothing is written), so many that the rest adds up to what it did in training.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from layers.param import CALIBRATED, param
from layers.types import Context

DOUBLINGS = 8  # the table has thresholds for 1, 2, 4, ..., 128 training lengths


@dataclasses.dataclass
class DtFilterConfig:
    """Skip tokens with small step sizes in global channels. Needs calibration: ``python -m eval.calibrate``.

    Pieces of one token (decoding) are never filtered, nor is anything within the training length.

    Attributes:
        scale: factor b on the calibrated thresholds; None for no filter.
        length: tokens of the whole prompt, whose threshold all of it gets, as published. None takes for each
            token the threshold of its own position: causal, and the same in one piece and in many.
        min_retention: channels are global if what they keep over a training length exceeds this (c).
    """

    scale: float | None = None
    length: int | None = None
    min_retention: float = 0.05


class DtFilter(nnx.Module):
    """The calibrated values of one layer with ``channels`` step sizes; those it is made with skip nothing.

    ``thresholds`` [T, H], ``retention`` [H] and the length [1] that the first threshold is for.
    """

    def __init__(self, channels: int, axis: str, config: DtFilterConfig):
        self.config = config
        self.thresholds = param(jnp.zeros((DOUBLINGS, channels)), (None, axis), CALIBRATED)
        self.retention = param(jnp.ones(channels), (axis,), CALIBRATED)
        self.base = param(jnp.ones(1), (None,), CALIBRATED)

    def __call__(self, dt: Float[Array, "B L H"], ctx: Context) -> Float[Array, "B L H"]:
        """``dt`` with that of skipped tokens 0."""
        c = self.config
        if c.scale is None or dt.shape[1] == 1:
            return dt
        calibrated = (self.thresholds[...], self.retention[...], self.base[...])
        thresholds, retention, base = jax.lax.stop_gradient(calibrated)
        length = ctx.positions + 1 if c.length is None else jnp.full_like(ctx.positions, c.length)
        threshold = c.scale * thresholds[nearest_row(length, base)]
        skipping = (length > base)[..., None] & (retention > c.min_retention)
        return filter_by_threshold(dt, jnp.where(skipping, threshold, 0).astype(dt.dtype))


def nearest_row(length: Int[Array, "*b"], base: Float[Array, "1"]) -> Int[Array, "*b"]:
    """Row of the table whose length base 2^k is the nearest to ``length``."""
    lengths = base * 2.0 ** jnp.arange(DOUBLINGS)
    return jnp.sum(length[..., None] > (lengths[1:] + lengths[:-1]) / 2, axis=-1, dtype=jnp.int32)


def filter_by_threshold(dt: Float[Array, "B L H"], threshold: Float[Array, "*s H"]) -> Float[Array, "B L H"]:
    """Keep what exceeds the threshold of its channel, else 0. Threshold 0 keeps everything: dt > 0."""
    return jnp.where(dt > threshold, dt, 0)


def filter_by_share(dt: Float[Array, "B L H"], share: Float[Array, " H"]) -> Float[Array, "B L H"]:
    """Keep the largest ``share`` of the tokens of each channel, rounded up; else 0."""
    count = jnp.ceil(share * dt.shape[1]).astype(jnp.int32)
    rank = jnp.argsort(jnp.argsort(-dt, axis=1), axis=1)
    return jnp.where(rank < count, dt, 0)


def scale_to_sum(dt: Float[Array, "B L H"], total: Float[Array, " H"]) -> Float[Array, "B L H"]:
    """Scale each channel so that its step sizes add up to ``total``."""
    return dt * (total / jnp.sum(dt, axis=1))[:, None]


def clamped(dt: Float[Array, "B L H"], share: float) -> Float[Array, "B L H"]:
    """``dt`` of each row bounded by the smallest of its channel's largest ``share`` of all tokens."""
    count = max(int(dt.shape[1] * share), 1)
    largest, _ = jax.lax.top_k(jnp.moveaxis(dt, 1, -1), count)
    return jnp.minimum(dt, largest[..., -1][:, None])


def calibrate(
    dt: Float[Array, "B L H"], length: int, share: float = 0.05
) -> tuple[Float[Array, "B H"], Float[Array, "B H"], Float[Array, "B H"]]:
    """Sums of clamped step sizes, and what leaves as much of them in a text of ``length`` tokens.

    The sizes of such a text are taken to be distributed as in the row: sorted, interpolated to ``length``
    points, and added up from the largest until the sum is reached.

    Returns:
        Of each row and channel: the sum; the share of tokens; the threshold.
    """
    dt = clamped(dt, share)
    total = jnp.sum(dt, axis=1)
    largest_first = -jnp.sort(-dt, axis=1)
    spread = _stretched(largest_first, length)
    count = jnp.argmax(jnp.cumsum(spread, axis=1) > total[:, None], axis=1) + 1
    at = jnp.minimum(count, length - 1)[:, None]
    return total, count / length, jnp.take_along_axis(spread, at, axis=1)[:, 0]


def table(dt: Float[Array, "B L H"], share: float = 0.05) -> Float[Array, "T H"]:
    """Thresholds for 1, 2, 4, ... times L tokens, averaged over rows; 0 (nothing is skipped) for L itself."""

    def of_channel(dt: Float[Array, "B L"]) -> Float[Array, " T"]:
        doubled = (calibrate(dt[..., None], dt.shape[1] * 2**k, share)[2] for k in range(1, DOUBLINGS))
        return jnp.stack([jnp.zeros((), dt.dtype), *(threshold.mean() for threshold in doubled)])

    # A few channels at a time: a long text has many tokens.
    return jax.lax.map(of_channel, jnp.moveaxis(dt, -1, 0), batch_size=16).T


def _stretched(values: Float[Array, "B L H"], length: int) -> Float[Array, "B M H"]:
    """Interpolated linearly to M = ``length`` points; point i stands for the interval [i, i + 1) L / M."""
    last = values.shape[1] - 1
    place = jnp.clip((jnp.arange(length) + 0.5) * ((last + 1) / length) - 0.5, 0, last).astype(values.dtype)
    low = jnp.floor(place).astype(jnp.int32)
    part = (place - low)[:, None]
    return (1 - part) * values[:, low] + part * values[:, jnp.minimum(low + 1, last)]


def retention(dt: Float[Array, "B L H"], A: Float[Array, "H M"], share: float = 0.05) -> Float[Array, " H"]:
    """exp(A sum dt) over a row, averaged over rows and over the M states of a channel."""
    total = jnp.sum(clamped(dt, share), axis=1)
    return jnp.exp(total[..., None] * A).mean(axis=(0, 2))

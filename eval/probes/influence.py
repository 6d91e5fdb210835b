"""How much the last output depends on each token before it: does a model look back, or at the last few?"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.inside import held_out, plain_model, reach, standard_error, trained_length
from eval.probes.plot import plot_curves
from eval.probes.types import Curve, NotApplicable, ProbeResult, Say
from layers.types import Context
from models.functional import Functional
from models.walk import embed, final_norm

RECENT = 64  # tokens whose share of all influence is told
FIRST_LAG = 8  # of the fit: nearer tokens are seen through convolutions too
PER_DOUBLING = 4  # points of a curve
SMALLEST = 1e-38  # nothing at all, as a float32


@dataclasses.dataclass(frozen=True)
class Influence:
    """The recency influence score of the SSM-Bottleneck paper (Wang et al. 2025, arXiv:2501.00658).

    I(s, t) = |d y_t / d x_s|, the norm of the Jacobian of the last hidden state at t by the embedding of
    token s, estimated with ``directions`` random unit vectors: sqrt(mean_r |J^T u_r|^2) for all s by one
    backward pass each. Two t: the last token and the middle one. Rows are text, of ``factor`` training
    lengths T; log I is averaged over them.

    ``slope`` is that of the fit of ln I over t - s in [8, T / 2], in nats a token, with the standard error
    over rows; ``r2`` says whether the decay is exponential at all. ``share_of_last_64`` is the share of the
    sum of I. A recurrence whose largest decay factor is A_max has a slope of about ln A_max at most.
    """

    name: ClassVar[str] = "influence"
    rows: int = 16
    directions: int = 4
    factor: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rows, self.directions) < 1 or self.factor <= 0:
            raise ValueError(f"{self.name}: rows, directions and factor should be positive, got {self}")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        plain_model(opened)
        trained = trained_length(opened)
        tokens = held_out(opened, reach(opened, round(self.factor * trained)), self.rows)
        length = tokens.shape[1]
        if length < 4 * FIRST_LAG:
            raise NotApplicable(
                f"a slope over lags from {FIRST_LAG} on takes {4 * FIRST_LAG} tokens, not {length}"
            )
        say(f"{len(tokens)} rows of {length} tokens, {self.directions} directions")
        ends = {"last": length - 1, "middle": length // 2}
        found = self._influence(opened, tokens, np.array(list(ends.values())))
        numbers: dict[str, Any] = {
            "training_length": trained,
            "length": length,
            "rows": len(tokens),
            **{key: {} for key in ("slope", "slope_standard_error", "r2", f"share_of_last_{RECENT}")},
        }
        curves, arrays = {}, {}
        for (name, end), of_rows in zip(ends.items(), found):
            by_lag = of_rows[:, end::-1]
            for key, value in _summary(by_lag, length // 2).items():
                numbers[key][name] = value
            curves[f"from the {name} token"] = _curve(by_lag)
            arrays[name] = by_lag
        return ProbeResult(numbers, curves, arrays)

    def plot(self, result: ProbeResult) -> Figure:
        return plot_curves(result.curves, "Influence of earlier tokens")

    def _influence(
        self, opened: OpenRun, tokens: Int[np.ndarray, "n L"], ends: Int[np.ndarray, " t"]
    ) -> Float[np.ndarray, "t n L"]:
        """I(s, t) by row for every t of ``ends``, a few rows at a time."""
        width = opened.config.model.d_model
        directions = np.random.default_rng(self.seed).normal(size=(self.directions, width))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        run, size = _program(opened.model), min(4, len(tokens))
        parts = []
        for first in range(0, len(tokens), size):
            rows = np.resize(tokens[first : first + size], (size, tokens.shape[1]))
            parts.append(jax.device_get(run(opened.params, rows, ends, directions.astype(np.float32))))
        return np.concatenate(parts, axis=1)[:, : len(tokens)]


@functools.lru_cache(maxsize=1)
def _program(model: Functional) -> Callable[..., Float[Array, "t B L"]]:
    @jax.jit
    def influence(params: Any, tokens: Array, ends: Array, directions: Array) -> Array:
        lm = model.bind(params)
        ctx = Context.create(*tokens.shape)

        def hidden(x: Array) -> Array:
            return final_norm(lm, lm.backbone(x, None, ctx)[0])

        y, back = jax.vjp(hidden, embed(lm, tokens, ctx))

        def at(end: Array) -> Array:
            def along(direction: Array) -> Array:
                (pulled,) = back(jnp.zeros_like(y).at[:, end].set(direction.astype(y.dtype)))
                return jnp.square(pulled.astype(jnp.float32)).sum(axis=-1)

            return jnp.sqrt(jax.lax.map(along, directions).mean(axis=0))

        return jax.lax.map(at, ends)

    return influence


def _summary(by_lag: Float[np.ndarray, "n T"], last: int) -> Mapping[str, float]:
    """Slope and the rest, from I by row and lag; the fit goes to the lag ``last``."""
    lags = np.arange(FIRST_LAG, min(last, by_lag.shape[1] - 1) + 1)
    logs = np.log(np.maximum(by_lag[:, lags], SMALLEST).astype(np.float64))
    centred = lags - lags.mean()
    slopes = logs @ centred / (centred @ centred)
    mean = logs.mean(axis=0)
    slope, apart = slopes.mean(), mean - mean.mean()
    left = apart - slope * centred
    share = by_lag[:, :RECENT].sum(axis=1) / by_lag.sum(axis=1)
    return {
        "slope": slope,
        "slope_standard_error": float(standard_error(slopes)),
        "r2": 1 - (left @ left) / (apart @ apart) if apart.any() else math.nan,
        f"share_of_last_{RECENT}": share.mean(),
    }


def _curve(by_lag: Float[np.ndarray, "n T"]) -> Curve:
    """The mean of log10 I in bins of the lag that grow with it, with its standard error over rows."""
    length = by_lag.shape[1]
    logs = np.log10(np.maximum(by_lag, SMALLEST).astype(np.float64))
    edges = np.unique(np.append(np.floor(2 ** np.arange(0, np.log2(length), 1 / PER_DOUBLING)), length))
    edges = edges.astype(int)
    rows = np.stack([logs[:, a:b].mean(axis=1) for a, b in zip(edges[:-1], edges[1:])], axis=1)
    middle = np.sqrt(edges[:-1] * (edges[1:] - 1.0))
    return Curve(middle, rows.mean(axis=0), "tokens back", "log10 of the influence", standard_error(rows))

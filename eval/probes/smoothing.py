"""Do the features of different tokens become the same with depth, and how unlike are a layer's decays?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.inside import held_out, is_recurrent, plain_model, reach, standard_error, trained_length
from eval.probes.plot import plot_curves
from eval.probes.types import Curve, ProbeResult, Say
from layers.dynamics import Selective, read_out
from layers.types import Context
from models.functional import Functional
from models.walk import Visit, embed, layer_name, sub_layers, walk

DEPTH, SPREAD = "sub-layer", "A_max - A_min, from here to the next point"
RELATIVE, COSINE = "mean distance of pairs / mean norm", "mean cosine of pairs"
PAIRED = 256  # tokens of a row, evenly spread, between which distances are taken
BINS = 20


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """Over-smoothing, after the SSM-Bottleneck paper (Wang et al. 2025, arXiv:2501.00658).

    For each sub-layer, how far the features of the tokens of a row are from each other, on text of
    ``factor`` training lengths: of what its mixer reads and gives, of the residual stream after it, and for
    selective recurrences of the written input b_t = dt_t x_t and the state's output C_t h_t.

    * ``distance``: 2 / (T (T - 1)) sum_{i<j} |x_i - x_j|, over 256 tokens of a row; ``relative`` to the mean
      norm;
    * ``cosine``: the mean over all pairs, in O(T): (|sum_i x_i / |x_i||^2 - T) / (T (T - 1)).

    Means over rows, and their standard errors, are in smoothing.npz as NAME [sub-layers, 3] and
    NAME_standard_error, NaN where there is no such thing.

    ``decay_spread`` is A_max - A_min of each recurrent layer, the largest less the smallest factor exp(dt A)
    by which a channel's states decay at one token of a row, averaged over channels; its distribution is a
    curve. Near 0 all is forgotten alike.
    """

    name: ClassVar[str] = "smoothing"
    rows: int = 8
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.factor <= 0:
            raise ValueError(f"{self.name}: rows and factor should be positive, got {self}")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        lm, trained = plain_model(opened), trained_length(opened)
        tokens = held_out(opened, max(reach(opened, round(self.factor * trained)), 2), self.rows)
        length = tokens.shape[1]
        names = [layer_name(i, kind) for i, (kind, _) in enumerate(sub_layers(lm))]
        say(f"{len(tokens)} rows of {length} tokens, {len(names)} sub-layers")
        looks = jax.device_get(_program(opened.model)(opened.params, tokens))
        spreads = {names[i]: spread.ravel() for i, spread in {**_steady(opened), **looks["spread"]}.items()}
        arrays, curves = {}, {}
        for name in ("input", "written", "state_output", "output", "stream"):
            rows = np.stack(
                [look.get(name, np.full((len(tokens), 3), np.nan)) for look in looks["layers"]], 1
            )
            arrays[name], error = rows.mean(axis=0), standard_error(rows)
            arrays[f"{name}_standard_error"] = error
            there = np.isfinite(arrays[name][:, 0])
            for column, short, label in ((1, "distance", RELATIVE), (2, "cosine", COSINE)):
                if there.any():
                    y, e = arrays[name][there, column], error[there, column]
                    curves[f"{name.replace('_', ' ')}, {short}"] = Curve(
                        1 + np.flatnonzero(there), y, DEPTH, label, e
                    )
        numbers: dict[str, Any] = {"training_length": trained, "length": length, "rows": len(tokens)}
        for column, key in enumerate(("distance", "relative", "cosine")):
            numbers[f"stream_{key}"] = dict(zip(names, arrays["stream"][:, column]))
        if spreads:
            numbers["decay_spread"] = {name: values.mean() for name, values in spreads.items()}
        curves |= {f"decays, {name}": _histogram(values) for name, values in spreads.items()}
        return ProbeResult(numbers, curves, arrays)

    def plot(self, result: ProbeResult) -> Figure:
        return plot_curves(result.curves, "Features of different tokens", linear=[DEPTH, SPREAD])


@functools.lru_cache(maxsize=1)
def _program(model: Functional) -> Callable[..., Any]:
    """``run(params, tokens)``: "layers", of each sub-layer three numbers a row by name; "spread" of some."""

    @jax.jit
    def run(params: Any, tokens: Array) -> Any:
        lm, ctx = model.bind(params), Context.create(*tokens.shape)
        layers, spread = [], {}
        for visit in walk(lm, embed(lm, tokens, ctx), ctx):
            layers.append({name: _apart(x) for name, x in _features(visit).items()})
            if isinstance(visit.mixer, Selective):
                dynamics = visit.mixer.dynamics(visit.inner, None, ctx)
                slow, fast = dynamics.dt.min(axis=1), dynamics.dt.max(axis=1)  # [B, H]
                spread[visit.depth] = jnp.exp(slow * dynamics.A.max(axis=1)) - jnp.exp(
                    fast * dynamics.A.min(axis=1)
                )
        return {"layers": layers, "spread": spread}

    return run


def _features(visit: Visit) -> dict[str, Float[Array, "B L _"]]:
    features = {"input": visit.inner, "output": visit.y, "stream": visit.out}
    if isinstance(visit.mixer, Selective):
        dynamics = visit.mixer.dynamics(visit.inner, None, visit.ctx)
        flat = (*visit.inner.shape[:2], -1)
        features["written"] = (dynamics.dt[..., None] * dynamics.x).reshape(flat)
        features["state_output"] = read_out(dynamics).reshape(flat)
    return features


def _apart(x: Float[Array, "B T D"]) -> Float[Array, "B 3"]:
    """Mean pairwise distance, the same over the mean norm, and mean pairwise cosine."""
    x, count = x.astype(jnp.float32), x.shape[1]
    norm = jnp.linalg.norm(x, axis=-1)
    unit = x / jnp.maximum(norm, 1e-30)[..., None]
    cosine = (jnp.square(unit.sum(axis=1)).sum(axis=-1) - count) / (count * (count - 1))
    some = x[:, np.unique(np.linspace(0, count - 1, min(PAIRED, count)).round().astype(int))]
    some = some - some.mean(axis=1, keepdims=True)  # what all have in common would cost digits below
    square = jnp.square(some).sum(axis=-1)
    product = jnp.einsum("bid,bjd->bij", some, some, precision="highest")
    apart = jnp.sqrt(jnp.maximum(square[:, :, None] + square[:, None] - 2 * product, 0))
    pairs = some.shape[1] * (some.shape[1] - 1)
    apart = jnp.where(jnp.eye(some.shape[1], dtype=bool), 0, apart)
    distance = apart.sum(axis=(1, 2)) / pairs
    return jnp.stack([distance, distance / jnp.maximum(norm.mean(axis=1), 1e-30), cosine], axis=1)


def _steady(opened: OpenRun) -> dict[int, Float[np.ndarray, " H"]]:
    """A_max - A_min of every head, of mixers whose dynamics are always the same."""
    found = {}
    for i, (_, layer) in enumerate(sub_layers(opened.model.bind(opened.params))):
        if is_recurrent(layer.mixer) and not isinstance(layer.mixer, Selective):
            size = np.exp(np.asarray(layer.mixer.log_eigenvalues().real))
            # S5 has one system for all features: its states are one channel's.
            size = size.reshape(1, -1) if size.shape[1] == 1 else size
            found[i] = size.max(axis=1) - size.min(axis=1)
    return found


def _histogram(values: Float[np.ndarray, " H"]) -> Curve:
    counts, edges = np.histogram(values, bins=BINS, range=(0, 1))
    return Curve(edges[:-1], counts / max(len(values), 1), SPREAD, "share of the channels")

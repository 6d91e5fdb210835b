"""How far back each layer looks: the mean distance of what the last token attends to."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.inside import held_out, plain_model, reach, spread, standard_error, trained_length
from eval.probes.plot import plot_curves
from eval.probes.types import Curve, NotApplicable, ProbeResult, Say
from layers.attention import Attention
from layers.dynamics import Dynamics, Selective, TimeInvariant
from layers.types import Context
from models.functional import Functional
from models.walk import embed, layer_name, sub_layers, walk


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """The Mamba mean distance of DeciMamba (Ben-Kish et al. 2024, arXiv:2406.14528), for every mixer.

    From the last row of a layer's attention, hidden or not, over a row of L tokens:

        MMD = sum_j (L - j) |alpha_{L,j}| / sum_j |alpha_{L,j}|,  averaged over heads (channels) and rows.

    * selective recurrences: alpha_{L,j} = C_L exp(A sum_{k>j} dt_k) dt_j B_j;
    * time-invariant ones: the response to an impulse L - j tokens ago, whatever the text;
    * softmax attention: its weights; of core-context attention those of the tokens behind the cores.

    The rows of every length begin alike, in one pass over the longest. A model that uses all that it reads
    has an MMD that grows with L; Mamba's stays at what it was trained on. ``mmd, LAYER`` is in tokens, by
    length, with the standard error over rows; MMD / L = 0.5 is even attention.
    """

    name: ClassVar[str] = "receptive_field"
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    rows: int = 4

    def __post_init__(self) -> None:
        if self.rows < 1 or not self.factors or min(self.factors) <= 0:
            raise ValueError(f"{self.name}: rows and factors should be positive, got {self}")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        lm, trained = plain_model(opened), trained_length(opened)
        wanted = {f"{factor:g}x": round(factor * trained) for factor in sorted(self.factors)}
        tokens = held_out(opened, reach(opened, max(wanted.values())), self.rows)
        lengths = {name: n for name, n in wanted.items() if 2 <= n <= tokens.shape[1]}
        layers = {i: kind for i, (kind, layer) in enumerate(sub_layers(lm)) if _reads_back(layer.mixer)}
        if not layers or not lengths:
            raise NotApplicable(f"no layer of {lm.config.pattern!r} mixes tokens over lengths {wanted}")
        tokens = tokens[:, : max(lengths.values())]
        say(f"{len(tokens)} rows of up to {tokens.shape[1]} tokens, {len(layers)} layers")
        program = _program(opened.model, tuple(lengths.values()))
        # One row at a time: the hidden attention of Mamba-1 has a number for each state, channel and token.
        found = [jax.device_get(program(opened.params, row[None])) for row in tokens]
        table = {i: np.array([row[i] for row in found]) for i in layers}  # [rows, lengths]
        numbers: dict[str, Any] = {
            "training_length": trained,
            "lengths": lengths,
            "rows": len(tokens),
            "left_out": {name: f"{n} tokens" for name, n in wanted.items() if name not in lengths},
        }
        sizes = np.array(list(lengths.values()))
        named = {layer_name(i, layers[i]): rows for i, rows in table.items()}
        errors = {name: standard_error(rows) for name, rows in named.items()}
        for name, rows in named.items():
            numbers[f"mmd, {name}"] = dict(zip(lengths, rows.mean(axis=0)))
            numbers[f"standard_error, {name}"] = dict(zip(lengths, errors[name]))
        curves = {}
        for name in spread(list(named)):
            mean, error = named[name].mean(axis=0), errors[name]
            curves[name] = Curve(sizes, mean / sizes, "tokens read", "mean distance / tokens", error / sizes)
            curves[f"{name}, tokens"] = Curve(sizes, mean, "tokens read", "mean distance, tokens", error)
        return ProbeResult(numbers, curves)

    def plot(self, result: ProbeResult) -> Figure:
        marks = {"training length": result.numbers["training_length"]}
        return plot_curves(result.curves, "Receptive field", marks=marks)


def _reads_back(mixer: Any) -> bool:
    return isinstance(mixer, (Attention, Selective, TimeInvariant))


@functools.lru_cache(maxsize=1)
def _program(model: Functional, lengths: Sequence[int]) -> Callable[..., dict[int, Float[Array, " n"]]]:
    """``run(params, tokens[1, L])``: the mean distance at each of ``lengths``, by index of the layer."""

    @jax.jit
    def run(params: Any, tokens: Array) -> dict[int, Array]:
        lm, ctx = model.bind(params), Context.create(*tokens.shape)
        found = {}
        for visit in walk(lm, embed(lm, tokens, ctx), ctx):
            if _reads_back(visit.mixer):
                rows = _last_rows(visit.mixer, visit.inner, lengths)
                found[visit.depth] = jnp.stack([mean_distance(row) for row in rows])
        return found

    return run


def mean_distance(row: Float[Array, "*H L"]) -> Float[Array, ""]:
    """sum_j (L - j) |alpha_j| / sum_j |alpha_j|, j = 1..L, averaged over heads."""
    size = jnp.abs(row).astype(jnp.float32)
    back = jnp.arange(row.shape[-1] - 1, -1, -1, dtype=jnp.float32)
    return ((size * back).sum(axis=-1) / jnp.maximum(size.sum(axis=-1), 1e-30)).mean()


def _last_rows(mixer: Any, x: Float[Array, "B L D"], lengths: Sequence[int]) -> list[Array]:
    """alpha of the last token over the first n, for each n of ``lengths``."""
    if isinstance(mixer, Selective):
        dynamics = mixer.dynamics(x, None, Context.create(*x.shape[:2]))
        return [hidden_attention(dynamics, n) for n in lengths]
    if isinstance(mixer, TimeInvariant):
        response = mixer.response(max(lengths))
        return [response[:, n - 1 :: -1] if n < response.shape[1] else response[:, ::-1] for n in lengths]
    return [attention_weights(mixer, x[:, :n]) for n in lengths]


def hidden_attention(dynamics: Dynamics, length: int) -> Float[Array, "B H n"]:
    """alpha_{n,j} of the first n = ``length`` tokens: C_n exp(A sum_{j<k<=n} dt_k) dt_j B_j."""
    _, dt, A, B, C = dynamics
    heads = dt.shape[2] // B.shape[2]
    dt, B = dt[:, :length].astype(jnp.float32), B[:, :length]
    after = jnp.cumsum(dt[:, ::-1], axis=1)[:, ::-1] - dt
    product = jnp.einsum("bgn,bjgn->bjgn", C[:, length - 1], B).astype(jnp.float32)
    if A.shape[1] == 1:  # one decay a head
        product = jnp.repeat(product.sum(axis=-1), heads, axis=2) * jnp.exp(A[:, 0] * after)
    else:
        product = jnp.repeat(product, heads, axis=2)
        product = (product * jnp.exp(A * after[..., None])).sum(axis=-1)
    return (product * dt).swapaxes(1, 2)


def attention_weights(mixer: Attention, x: Float[Array, "B L D"]) -> Float[Array, "B H L"]:
    """Of the last token over all: the gradient of its output, which is linear in the values.

    Heads that share values have a coordinate each to tell them apart.

    Raises:
        ValueError: more such heads than coordinates.
    """
    shared = mixer.heads // mixer.kv_heads
    if shared > mixer.head_dim:
        raise ValueError(
            f"{shared} query heads a key head need head_dim of at least that, not {mixer.head_dim}"
        )
    values, mix = mixer.mixing(x, Context.create(*x.shape[:2]))
    heads = np.arange(mixer.heads)
    y, back = jax.vjp(mix, values)
    (weights,) = back(jnp.zeros_like(y).at[:, -1, heads, heads % shared].set(1))
    return weights[:, :, heads // shared, heads % shared].swapaxes(1, 2)

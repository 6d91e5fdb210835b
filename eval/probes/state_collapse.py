"""What becomes of the recurrent states far beyond the training length: do they grow, and does the loss?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.inside import (
    FACT,
    is_recurrent,
    plain_model,
    reach,
    repeated,
    spread,
    standard_error,
    text_rows,
    trained_length,
)
from eval.probes.plot import plot_curves
from eval.probes.state_watch import STATISTICS, Seen, watch
from eval.probes.types import Curve, NotApplicable, ProbeResult, Say
from models.walk import layer_name, sub_layers

LOSS_LIMIT = 2.0  # times the largest loss within the training length: the formal test
OUTLIERS_AT = 2.5  # training lengths, where channels are compared with those at 1
VAR_LIMIT = 4.0  # times the largest variance of a head within the training length
VAR, RMS = STATISTICS.index("var"), STATISTICS.index("rms")
POSITION, GROWTH = "tokens read", "variance of a state / its largest in 1x"


@dataclasses.dataclass(frozen=True)
class StateCollapse:
    """Stuffed Mamba's diagnostics (Chen et al. 2024, arXiv:2410.07145) on three kinds of prompt.

    "text" is validation documents run together, "newlines" and "fact" one line again and again. After every
    bucket of tokens: the loss, averaged over rows, and of each recurrent layer and head the statistics of its
    state, what it retains of the first token, and its dt, B and x. The inputs kept by a convolution are the
    control: they cannot grow with length. Means over the rows of a prompt are in state_collapse.npz, as
    PROMPT/KIND/state [layers, buckets, heads, 4] (mean, variance, RMS, median) and so on, KIND such as
    mamba2, its sub-layers in ``layers``; PROMPT/KIND/channel_rms [layers, 2, heads, P], after 1 and 2.5
    training lengths, tells outlier channels.

    ``forgets`` is 1 if the model has learned to forget: on text the loss of no bucket exceeds twice the
    largest within the training length; ``loss_growth`` is that ratio. T_forget of a state size is the
    smallest training length for which ``forgets`` is 1. ``collapses`` are prompts on which the loss does so
    and the variance of any head's state exceeds four times its largest within the training length
    (``variance_growth``). The paper averages tokens over 128 prompts; with few rows a bucket has to.

    Attributes:
        factor: how far is read, in training lengths.
        bucket: tokens; 0 for an eighth of the training length, at most 128.
        rows: of text.
    """

    name: ClassVar[str] = "state_collapse"
    factor: float = 16.0
    bucket: int = 0
    rows: int = 4

    def __post_init__(self) -> None:
        for field, low in (("factor", 1), ("bucket", 0), ("rows", 1)):
            if getattr(self, field) < low:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)} should be at least {low}")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        lm, trained = plain_model(opened), trained_length(opened)
        layers = {i: kind for i, (kind, layer) in enumerate(sub_layers(lm)) if is_recurrent(layer.mixer)}
        if not layers:
            raise NotApplicable(f"there is no recurrent layer in model.pattern={lm.config.pattern!r}")
        bucket = self.bucket or min(128, max(trained // 8, 1))
        length = reach(opened, round(self.factor * trained)) // bucket * bucket
        inside = trained // bucket
        if not 0 < inside < length // bucket:
            raise NotApplicable(
                f"{length} tokens in buckets of {bucket} do not reach beyond the training length {trained}"
            )
        prompts = self._prompts(opened, length)
        say(f"{length} tokens of {', '.join(prompts)}")
        seen = watch(opened, np.concatenate(list(prompts.values())), bucket, say)
        rows = _rows_of(prompts)
        numbers: dict[str, Any] = {
            "training_length": trained,
            "length": length,
            "bucket": bucket,
            "layers": {kind: [i for i in layers if layers[i] == kind] for kind in layers.values()},
            "rows": {name: len(part) for name, part in prompts.items()},
        }
        losses = {name: _buckets(seen.loss[part], bucket) for name, part in rows.items()}
        states = {name: _means(seen, part) for name, part in rows.items()}
        numbers |= _verdict(losses, states, layers, inside)
        ends = bucket * (1 + np.arange(length // bucket))
        curves = _curves(losses, states, layers, inside, ends)
        compared = [inside - 1, min(round(OUTLIERS_AT * inside), len(ends)) - 1]
        return ProbeResult(numbers, curves, _arrays(losses, states, layers, ends, compared))

    def plot(self, result: ProbeResult) -> Figure:
        marks = {"training length": result.numbers["training_length"]}
        return plot_curves(
            result.curves, "States beyond the training length", marks=marks, logarithmic=[GROWTH]
        )

    def _prompts(self, opened: OpenRun, length: int) -> dict[str, np.ndarray]:
        """Rows [n, L + 1] by the name of the prompt; only text without a tokenizer."""
        prompts = {"text": text_rows(opened, length, self.rows)}
        if opened.tokenizer is not None:
            for name, line in (("newlines", "\n"), ("fact", FACT)):
                ids = opened.tokenizer.encode(line)
                prompts[name] = repeated(ids, length + 1, opened.tokenizer.separator_id)
        return prompts


def _rows_of(prompts: Mapping[str, np.ndarray]) -> dict[str, slice]:
    ends = np.cumsum([len(part) for part in prompts.values()])
    return {name: slice(end - len(prompts[name]), end) for name, end in zip(prompts, ends)}


def _buckets(loss: Float[np.ndarray, "B L"], bucket: int) -> Float[np.ndarray, "B n"]:
    return loss.reshape(len(loss), -1, bucket).mean(axis=2, dtype=np.float64)


def _means(seen: Seen, rows: slice) -> dict[int, dict[str, np.ndarray]]:
    """``seen.layers`` with the mean over some rows in place of the axis B."""
    return {i: {key: value[rows].mean(axis=0) for key, value in at.items()} for i, at in seen.layers.items()}


def _growth(values: Float[np.ndarray, "n ..."], inside: int) -> Float[np.ndarray, "n ..."]:
    """Values over the largest among the first ``inside`` buckets."""
    return values / np.maximum(values[:inside].max(axis=0), np.finfo(np.float32).tiny)


def _verdict(losses: Mapping, states: Mapping, layers: Mapping[int, str], inside: int) -> dict[str, Any]:
    """The tests on loss and variance, by prompt, and the retention of the slowest heads on text."""
    loss = {name: _growth(rows.mean(axis=0), inside)[inside:].max() for name, rows in losses.items()}
    variance, worst = {}, {}
    for name, at in states.items():
        growth = {i: _growth(at[i]["state"][..., VAR], inside)[inside:].max(axis=0) for i in layers}
        i = max(growth, key=lambda i: growth[i].max())
        variance[name] = growth[i].max()
        worst[name] = f"{layer_name(i, layers[i])}, head {growth[i].argmax()}"
    retained = {layer_name(i, layers[i]): np.exp(states["text"][i]["log_retention"]) for i in layers}
    return {
        "forgets": int(loss["text"] <= LOSS_LIMIT),
        "loss_growth": loss,
        "variance_growth": variance,
        "fastest_growing_head": worst,
        # Not a number is no proof of health.
        "collapses": {
            name: int(not (loss[name] <= LOSS_LIMIT or variance[name] <= VAR_LIMIT)) for name in loss
        },
        "retained_after_1x": {name: kept[inside - 1].max() for name, kept in retained.items()},
        "retained_at_the_end": {name: kept[-1].max() for name, kept in retained.items()},
    }


def _curves(
    losses: Mapping, states: Mapping, layers: Mapping[int, str], inside: int, ends: np.ndarray
) -> dict[str, Curve]:
    def curve(y: np.ndarray, ylabel: str, error: np.ndarray | None = None) -> Curve:
        return Curve(ends, y, POSITION, ylabel, error)

    curves = {}
    for name, rows in losses.items():
        error = standard_error(rows) if len(rows) > 1 else None
        curves[f"loss, {name}"] = curve(rows.mean(axis=0), "nats per token", error)
    for name, at in states.items():
        growth = [_growth(at[i]["state"][..., VAR], inside).max(axis=1) for i in layers]
        curves[f"fastest growing head, {name}"] = curve(np.max(growth, axis=0), GROWTH)
    control = [_growth(at["conv"][..., VAR], inside) for at in states["text"].values() if "conv" in at]
    if control:
        curves["control: convolution, text"] = curve(np.max(control, axis=0), GROWTH)
    named = {layer_name(i, layers[i]): states["text"][i] for i in layers}
    for name in spread(list(named)):
        curves[f"largest head of {name}"] = curve(
            named[name]["state"][..., RMS].max(axis=1), "RMS of a state"
        )
        slowest = named[name]["log_retention"].max(axis=1) / np.log(10)
        curves[f"slowest head of {name}"] = curve(slowest, "log10 of what is left of the first token")
    return curves


def _arrays(
    losses: Mapping, states: Mapping, layers: Mapping[int, str], ends: np.ndarray, compared: list[int]
) -> dict[str, Any]:
    """By "PROMPT/KIND/NAME", the layers of a kind stacked; of channels the ``compared`` buckets alone."""
    arrays = {"tokens": ends, **{f"{name}/loss": rows.mean(axis=0) for name, rows in losses.items()}}
    for prompt, at in states.items():
        for kind in dict.fromkeys(layers.values()):
            of_kind = [at[i] for i in layers if layers[i] == kind]
            for key in of_kind[0]:
                stacked = np.stack([one[key] for one in of_kind])
                arrays[f"{prompt}/{kind}/{key}"] = stacked[:, compared] if key == "channel_rms" else stacked
    return arrays

"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure


def read_records(path: epath.PathLike) -> list[dict[str, Any]]:
    """Records of a metrics file, one JSON object a line; a last line cut short by a crash is dropped."""
    records = []
    for line in epath.Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_loss(
    records: Sequence[Mapping[str, Any]],
    path: epath.PathLike,
    *,
    title: str = "",
    reference: Mapping[str, float] | None = None,
) -> None:
    """Writes a PNG of bits per byte (nats per token without bytes) against training steps.

    Args:
        records: with "step" and some of "train/bits_per_byte", "train/loss", "validation/bits_per_byte",
            "validation/loss".
        reference: horizontal lines by name, such as the n-gram models of the same split.
    """
    metric = "bits_per_byte" if any("train/bits_per_byte" in r for r in records) else "loss"
    label = {"bits_per_byte": "bits per byte", "loss": "nats per token"}[metric]
    figure = Figure(figsize=(7.6, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    values = []
    for split, colour in (("train", "tab:blue"), ("validation", "tab:orange")):
        points = [(r["step"], r[f"{split}/{metric}"]) for r in records if f"{split}/{metric}" in r]
        steps, raw = np.array([p for p in points if isinstance(p[1], float)]).reshape(-1, 2).T
        if split == "train":
            axes.plot(steps, raw, lw=0.6, alpha=0.3, color=colour)
            raw = _running_mean(raw)
        if raw.size:
            marker = "o" if split == "validation" else ""
            axes.plot(steps, raw, lw=1.6, color=colour, marker=marker, ms=3, label=f"{split} {raw[-1]:.3f}")
            values += [raw[-1], *raw[raw.size // 4 :: max(raw.size // 50, 1)]]
    for i, (name, value) in enumerate((reference or {}).items()):
        axes.axhline(value, ls=("--", "-.", ":")[i % 3], lw=1, color="0.4", label=f"{name} {value:.3f}")
        values.append(value)
    if values:
        axes.set_ylim(min(values) - 0.1, max(values) + 0.3)
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png")


def _running_mean(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """Mean over the last ``share`` of all values (at least one) at each point."""
    width = max(int(values.size * share), 1)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, values.size + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)

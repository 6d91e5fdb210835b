"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

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
    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    finals = []
    for split, style in (
        ("train", {"lw": 1.0, "alpha": 0.6}),
        ("validation", {"lw": 1.8, "marker": "o", "ms": 3}),
    ):
        points = [
            (r["step"], r[f"{split}/{metric}"]) for r in records if r.get(f"{split}/{metric}") is not None
        ]
        if points:
            axes.plot(*zip(*points), label=f"{split}, last {points[-1][1]:.3f}", **style)
            finals.append(points[-1][1])
    for i, (name, value) in enumerate((reference or {}).items()):
        axes.axhline(value, ls=("--", "-.", ":")[i % 3], lw=1, color="0.4", label=f"{name} {value:.3f}")
    low = min([*finals, *(reference or {}).values(), 8.0])
    high = max([*(v * 1.25 for v in finals), *(v * 1.1 for v in (reference or {}).values()), low + 0.5])
    axes.set_ylim(low - 0.1, high)
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png")

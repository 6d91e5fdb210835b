"""The picture of a probe's curves."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from eval.probes.types import Curve


def plot_curves(
    curves: Mapping[str, Curve], title: str, *, marks: Mapping[str, float] | None = None
) -> Figure:
    """Curves over a logarithmic axis, one panel for each quantity.

    Args:
        marks: vertical lines by name, such as the training length.
    """
    quantities = list(dict.fromkeys((curve.xlabel, curve.ylabel) for curve in curves.values()))
    figure = Figure(figsize=(6.4 * max(len(quantities), 1), 4.2), dpi=130, layout="constrained")
    for axes, quantity in zip(figure.subplots(1, max(len(quantities), 1), squeeze=False)[0], quantities):
        for i, (name, value) in enumerate((marks or {}).items()):
            axes.axvline(value, ls=("--", "-.", ":")[i % 3], lw=1, color="0.5", label=name)
        for name, curve in curves.items():
            if (curve.xlabel, curve.ylabel) == quantity:
                axes.errorbar(curve.x, curve.y, curve.error, lw=1.5, marker="o", ms=3, capsize=2, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=quantity[0], ylabel=quantity[1])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure

"""The picture of a probe's curves."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from matplotlib.figure import Figure

from eval.probes.types import Curve

DENSE = 40  # points from which on they are not marked one by one


def plot_curves(
    curves: Mapping[str, Curve],
    title: str,
    *,
    marks: Mapping[str, float] | None = None,
    linear: Collection[str] = (),
    logarithmic: Collection[str] = (),
) -> Figure:
    """Curves over a logarithmic axis, one panel for each quantity, two panels a row.

    Args:
        marks: vertical lines by name, such as the training length.
        linear: labels of horizontal axes that are not to be logarithmic, and have no marks.
        logarithmic: labels of vertical axes that are.
    """
    quantities = list(dict.fromkeys((curve.xlabel, curve.ylabel) for curve in curves.values()))
    columns = min(max(len(quantities), 1), 2)
    rows = max(-(-len(quantities) // columns), 1)
    figure = Figure(figsize=(6.4 * columns, 4.2 * rows), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in panels[len(quantities) :]:
        unused.set_axis_off()
    for axes, quantity in zip(panels, quantities):
        marked = {} if quantity[0] in linear else marks or {}
        for i, (name, value) in enumerate(marked.items()):
            axes.axvline(value, ls=("--", "-.", ":")[i % 3], lw=1, color="0.5", label=name)
        for name, curve in curves.items():
            if (curve.xlabel, curve.ylabel) == quantity:
                dense = len(curve.x) > DENSE
                look = (
                    {"lw": 1.0, "elinewidth": 0.3}
                    if dense
                    else {"lw": 1.5, "marker": "o", "ms": 3, "capsize": 2}
                )
                axes.errorbar(curve.x, curve.y, curve.error, label=name, **look)
        if quantity[0] not in linear:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        if quantity[1] in logarithmic:
            axes.set_yscale("log")
        axes.set(xlabel=quantity[0], ylabel=quantity[1])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure

"""The charts and heat maps of a report as PNG files, for a paper or a slide."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from eval.report.document import Chart, HeatMap, Report

COLOURS = ("#0072b2", "#d55e00", "#008860", "#a8548a", "#7a6a00", "#3b3b98", "#b5342c", "#4d5358")
DASHES = ("-", "--", ":", "-.", (0, (4, 1, 1, 1, 1, 1)), (0, (9, 2)))
MARKS = "os^Dvp"


def save_pictures(report: Report, directory: epath.PathLike) -> list[epath.Path]:
    """Writes every chart and heat map to ``directory``, named by section and title; returns their paths."""
    directory, paths = epath.Path(directory), list[epath.Path]()
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("[0-9][0-9]_*.png"):  # of an earlier report, which may have had others
        old.unlink()
    for number, (section, block) in enumerate(_drawn(report), 1):
        name = re.sub(r"[^a-z0-9]+", "_", f"{section} {block.title}".lower()).strip("_")[:80]
        path = directory / f"{number:02d}_{name}.png"
        figure = chart(block) if isinstance(block, Chart) else heatmap(block)
        with path.open("wb") as file:
            figure.savefig(file, format="png")
        paths.append(path)
    return paths


def chart(block: Chart) -> Figure:
    """The lines of a chart, with bands."""
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for s in block.series:
        colour, dash = COLOURS[s.colour % 8], DASHES[(s.colour if s.dash is None else s.dash) % 6]
        mark = MARKS[s.colour % 6] if s.marks and not s.thin else ""
        style = {"lw": 0.8, "alpha": 0.4, "ls": "-"} if s.thin else {"lw": 1.6, "ls": dash if s.line else ""}
        axes.plot(s.x, s.y, color=colour, marker=mark, ms=4, label=s.name or None, **style)
        if s.low is not None and s.high is not None:
            axes.fill_between(s.x, s.low, s.high, color=colour, alpha=0.17, lw=0)
    for name, value in block.references.items():
        axes.axhline(value, ls=":", lw=1, color="0.3", label=f"{name} {value:.3g}")
    if block.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if block.y_range:
        axes.set_ylim(*block.y_range)
    axes.set(xlabel=block.xlabel, ylabel=block.ylabel, title=block.title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return figure


def heatmap(block: HeatMap) -> Figure:
    """The cells of a heat map, with their numbers."""
    rows, columns = len(block.y), len(block.x)
    size = (2.2 + 0.55 * max(columns, 4), 1.4 + 0.32 * max(rows, 3))
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.subplots()
    values = np.asarray(block.values, np.float64).reshape(rows, columns)
    shown = axes.imshow(values, cmap="Blues", vmin=block.low, vmax=block.high, aspect="auto")
    figure.colorbar(shown)
    middle = (block.low + block.high) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value > middle else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(columns), block.x)
    axes.set_yticks(range(rows), block.y)
    axes.set(xlabel=block.xlabel, ylabel=block.ylabel, title=block.title)
    return figure


def _drawn(report: Report) -> Iterator[tuple[str, Chart | HeatMap]]:
    for section in report.sections:
        for block in section.blocks:
            if isinstance(block, (Chart, HeatMap)):
                yield section.title, block

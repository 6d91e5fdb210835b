"""Heat maps as inline SVG: shades of one colour of the page's style, and the number in each cell."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from eval.report.document import HeatMap

WIDTH, ROW, TOP, BOTTOM, RIGHT = 460, 26, 6, 44, 10
LETTER = 7.0  # width of one in the names of rows
DARKEST = 0.62  # opacity: text on it must stay legible
NARROWEST = 30  # cells with room for a number


def draw(heatmap: HeatMap) -> str:
    """The heat map as one ``<svg>``; without a cell it only says so."""
    label = html.escape(f"{heatmap.title}. {describe(heatmap)}")
    if not heatmap.x or not heatmap.y:
        return (
            f'<svg viewBox="0 0 {WIDTH} {ROW + BOTTOM}" role="img" aria-label="{label}">'
            f'<text x="{WIDTH / 2}" y="{ROW}" class="empty">nothing recorded</text></svg>'
        )
    height = TOP + _row(heatmap) * len(heatmap.y) + BOTTOM
    begin = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
    return "".join([begin, *_cells(heatmap), "</svg>"])


def describe(heatmap: HeatMap) -> str:
    """The heat map in words, for who cannot see it: its rows with their lowest and highest numbers."""
    said = [f"By {heatmap.xlabel} and {heatmap.ylabel}."]
    for name, row in zip(heatmap.y, heatmap.values):
        known = [value for value in row if math.isfinite(value)]
        if known:
            said.append(f"{name}: {min(known):.3g} to {max(known):.3g}.")
    return " ".join(said)


def shade(heatmap: HeatMap, value: float) -> float:
    """Where ``value`` lies between ``low`` and ``high``, from 0 to 1."""
    return min(max((value - heatmap.low) / (heatmap.high - heatmap.low), 0.0), 1.0)


def _row(heatmap: HeatMap) -> int:
    """Height of a row: the name of the axis must fit beside few of them."""
    return max(ROW, math.ceil((LETTER * len(heatmap.ylabel) + 6) / len(heatmap.y)))


def _cells(heatmap: HeatMap) -> Iterator[str]:
    left = 24 + min(LETTER * max(map(len, heatmap.y)), 0.4 * WIDTH)
    wide, high = (WIDTH - left - RIGHT) / len(heatmap.x), _row(heatmap)
    bottom = TOP + high * len(heatmap.y)
    for i, (name, row) in enumerate(zip(heatmap.y, heatmap.values)):
        y = TOP + high * i
        yield _text("tick", f'x="{left - 6:.1f}" y="{y + high / 2 + 4}" text-anchor="end"', name)
        for j, value in enumerate(row):
            yield _cell(heatmap, value, left + wide * j, y, wide, high)
    every = max(
        1, math.ceil(len(heatmap.x) * (LETTER * max(map(len, heatmap.x)) + 4) / (WIDTH - left - RIGHT))
    )
    for j, name in list(enumerate(heatmap.x))[::every]:
        x = left + wide * (j + 0.5)
        yield _text("tick", f'x="{x:.1f}" y="{bottom + 15}" text-anchor="middle"', name)
    middle = (left + WIDTH - RIGHT) / 2
    yield _text("label", f'x="{middle:.1f}" y="{bottom + 36}" text-anchor="middle"', heatmap.xlabel)
    turned = f'transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle"'
    yield _text("label", turned, heatmap.ylabel)


def _text(kind: str, place: str, text: str) -> str:
    return f'<text class="{kind}" {place}>{html.escape(text)}</text>'


def _cell(heatmap: HeatMap, value: float, x: float, y: float, wide: float, high: float) -> str:
    place = f'x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{high}"'
    if not math.isfinite(value):
        return f'<rect class="cell none" {place}/>'
    rect = f'<rect class="cell" {place} fill-opacity="{DARKEST * shade(heatmap, value):.3f}"/>'
    if wide < NARROWEST:
        return rect
    return f'{rect}<text class="value" x="{x + wide / 2:.1f}" y="{y + high / 2 + 4}">{value:.2f}</text>'

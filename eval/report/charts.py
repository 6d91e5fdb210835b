"""Charts as inline SVG: text stays text, colours come from the page's style (light, dark, print)."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.ticker import MaxNLocator

from eval.report.document import Chart, Series

WIDTH, HEIGHT = 460, 290  # of the view box; text is sized to stay legible on a screen 360 pixels wide
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 12, 44
COLOURS, DASHES, MARKS = 8, 6, 6  # that style.css and _MARKS tell apart
# Around (0, 0): circle, square, triangle, diamond, triangle down, cross.
_MARKS = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    "M-3 -3h6v6h-6z",
    "M0 -4L3.8 2.8H-3.8z",
    "M0 -4.2L4.2 0L0 4.2L-4.2 0z",
    "M0 4L3.8 -2.8H-3.8z",
    "M-3.4 -1.1h2.3v-2.3h2.2v2.3h2.3v2.2h-2.3v2.3h-2.2v-2.3h-2.3z",
)
Scale = Callable[[float], float]


def draw(chart: Chart, identity: str) -> str:
    """The chart as one ``<svg>``; without a point it only says so.

    Args:
        identity: unique in the page.
    """
    points = [(x, y) for s in chart.series for x, y in _points(s)]
    label = html.escape(f"{chart.title}. {describe(chart)}")
    begin = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    if not points:
        return f'{begin}<text x="{WIDTH / 2}" y="{HEIGHT / 2}" class="empty">nothing recorded</text></svg>'
    to_x, x_ticks = _x_axis(chart, [x for x, _ in points])
    to_y, y_ticks = _y_axis(chart, [y for _, y in points])
    area = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    parts = [
        begin,
        f'<clipPath id="{identity}"><rect {area}/></clipPath>',
        *_axes(chart, to_x, x_ticks, to_y, y_ticks),
        f'<g clip-path="url(#{identity})">',
        *_references(chart, to_y),
    ]
    several = len({(s.colour, s.dash) for s in chart.series if s.line}) > 1
    for series in sorted(chart.series, key=lambda s: not s.thin):
        parts.append(_series(series, to_x, to_y, several))
    return "".join([*parts, "</g>", *_reference_labels(chart, to_y), "</svg>"])


def legend(chart: Chart) -> list[tuple[str, str]]:
    """``(name, svg)`` for each named line."""
    return [(s.name, key(s)) for s in chart.series if s.name]


def key(series: Series) -> str:
    """What the line looks like, as a small ``<svg>``."""
    band = '<rect class="band" x="1" y="1" width="30" height="12"/>' if series.low is not None else ""
    line = ('<path class="line" d="M1 7H31"/>' if series.line else "") + _mark(series, 16, 7)
    return f'<svg class="key {_style(series)}" viewBox="0 0 32 14" aria-hidden="true">{band}{line}</svg>'


def describe(chart: Chart) -> str:
    """The chart in words, for who cannot see it: where each named line begins and ends."""
    said = [f"{chart.ylabel} against {chart.xlabel}."]
    for s in chart.series:
        points = list(_points(s))
        if s.name and points:
            (x0, y0), (x1, y1) = points[0], points[-1]
            said.append(f"{s.name}: {y0:.4g} at {short(x0)}, {y1:.4g} at {short(x1)}.")
    said += [f"{name}: {value:.4g}." for name, value in chart.references.items()]
    return " ".join(said)


def short(value: float) -> str:
    """A number for an axis: 0.25, 1024, 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def _points(series: Series) -> Iterator[tuple[float, float]]:
    return ((x, y) for x, y in zip(series.x, series.y) if math.isfinite(x) and math.isfinite(y))


def _x_axis(chart: Chart, values: Sequence[float]) -> tuple[Scale, list[float]]:
    at = math.log2 if chart.log_x else float
    low, high = at(min(values)), at(max(values))
    if chart.log_x:
        every = max(1, math.ceil((high - low) / 6))
        ticks = [2.0**k for k in range(math.ceil(low), math.floor(high) + 1, every)]
        if len(ticks) < 2:
            ticks = [2**low, 2**high]
    else:
        ticks = list(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    span = (high - low) or 1.0
    low, high = low - 0.02 * span, high + 0.02 * span
    scale = (WIDTH - LEFT - RIGHT) / (high - low)
    return (lambda x: LEFT + (at(x) - low) * scale), [t for t in ticks if low <= at(t) <= high]


def _y_axis(chart: Chart, values: Sequence[float]) -> tuple[Scale, list[float]]:
    edges = [e for s in chart.series for e in (*(s.low or ()), *(s.high or ())) if math.isfinite(e)]
    shown = [*values, *edges, *chart.references.values()]
    low, high = chart.y_range or (min(shown), max(shown))
    if low == high == 0:
        high = 1.0  # zeros are mostly shares of what could be right
    if chart.y_range is None:
        pad = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - pad, high + pad
    scale = (HEIGHT - TOP - BOTTOM) / (high - low)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return (lambda y: HEIGHT - BOTTOM - (y - low) * scale), [t for t in ticks if low <= t <= high]


def _axes(
    chart: Chart, to_x: Scale, x_ticks: Sequence[float], to_y: Scale, y_ticks: Sequence[float]
) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    for y in y_ticks:
        at = to_y(y)
        yield f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(y)}</text>'
    for x in x_ticks:
        at = min(to_x(x), WIDTH - RIGHT - 10)
        yield f'<path class="axis" d="M{to_x(x):.1f} {bottom}v4"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{short(x)}</text>'
    yield f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    xlabel, ylabel = html.escape(chart.xlabel), html.escape(chart.ylabel)
    yield f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{xlabel}</text>'
    half = (TOP + bottom) / 2
    turned = f'transform="translate(13 {half}) rotate(-90)" text-anchor="middle"'
    yield f'<text class="label" {turned}>{ylabel}</text>'


def _series(series: Series, to_x: Scale, to_y: Scale, several: bool) -> str:
    points = list(_points(series))
    line = _path(series, to_x, to_y)
    parts = [f'<g class="{_style(series)}{" thin" if series.thin else ""}">']
    if series.low is not None and series.high is not None:
        edges = [
            (x, a, b)
            for x, a, b in zip(series.x, series.low, series.high)
            if all(map(math.isfinite, (x, a, b)))
        ]
        there = " ".join(f"{to_x(x):.1f},{to_y(b):.1f}" for x, _, b in edges)
        back = " ".join(f"{to_x(x):.1f},{to_y(a):.1f}" for x, a, _ in reversed(edges))
        parts.append(f'<polygon class="band" points="{there} {back}"/>')
    if series.line:
        parts.append(f'<path class="line" d="{line}"/>')
    if series.marks and not series.thin:
        parts += [_mark(series, to_x(x), to_y(y)) for x, y in points]
    elif several and not series.thin:
        # A handful, at other places for each colour, so that lines are told apart without colour.
        every = max(len(points) // 5, 1)
        first = (every * (series.colour % COLOURS)) // COLOURS
        parts += [_mark(series, to_x(x), to_y(y)) for x, y in points[first::every]]
    return "".join([*parts, "</g>"])


def _path(series: Series, to_x: Scale, to_y: Scale) -> str:
    out, pen = [], "M"
    for x, y in zip(series.x, series.y):
        if math.isfinite(x) and math.isfinite(y):
            out.append(f"{pen}{to_x(x):.1f} {to_y(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(out)


def _mark(series: Series, x: float, y: float) -> str:
    shape = _MARKS[series.colour % MARKS]
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def _style(series: Series) -> str:
    dash = series.colour if series.dash is None else series.dash
    return f"c{series.colour % COLOURS} d{dash % DASHES}"


def _references(chart: Chart, to_y: Scale) -> Iterator[str]:
    for value in chart.references.values():
        yield f'<path class="reference" d="M{LEFT} {to_y(value):.1f}H{WIDTH - RIGHT}"/>'


def _reference_labels(chart: Chart, to_y: Scale) -> Iterator[str]:
    """Above their lines at the right, from the top down, moved up no closer than a line of text."""
    above = math.inf
    shown = [(n, v) for n, v in chart.references.items() if TOP <= to_y(v) <= HEIGHT - BOTTOM]
    for name, value in sorted(shown, key=lambda item: item[1]):
        at = min(to_y(value) - 3, above - 13)
        above = at
        text = html.escape(f"{name} {value:.{3 if abs(value) < 10 else 1}f}")
        yield f'<text class="reference" x="{WIDTH - RIGHT - 2}" y="{at:.1f}" text-anchor="end">{text}</text>'

"""What a report is made of: plain data, from which the page is drawn and which report.json holds.

A study of its own makes a ``Report`` of these and gives it to ``eval.report.save``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: in the legend; "" leaves the line out of it.
        x, y: points; what is not finite breaks the line.
        low, high: edges of a band around ``y``, or None.
        colour: number of the colour and the marker, the same for an architecture in every chart.
        dash: number of the dash pattern; None for that of the colour.
        marks: mark every point; for few measured points. Otherwise a few marks tell lines apart.
        thin: a line in the background, such as one seed beside the mean of several.
        line: join the points; False for measured points beside the law that was fitted to them.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    dash: int | None = None
    marks: bool = False
    thin: bool = False
    line: bool = True


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over two axes.

    Attributes:
        caption: a sentence below: what is drawn, and what a band means.
        references: horizontal lines by name.
        log_x: logarithmic horizontal axis (base 2); then every x must be positive.
        y_range: lowest and highest y shown, None for what is there; lines are cut at it.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Sequence[Series]
    caption: str = ""
    references: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log_x: bool = False
    y_range: tuple[float, float] | None = None
    kind: Literal["chart"] = dataclasses.field(default="chart", init=False)


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """A number for each of some columns and rows, as a shade and in digits.

    Attributes:
        x, y: names of the columns and, from the top, of the rows.
        values: [row][column]; what is not finite is left blank.
        low, high: of the lightest and the darkest shade.
    """

    title: str
    xlabel: str
    ylabel: str
    x: Sequence[str]
    y: Sequence[str]
    values: Sequence[Sequence[float]]
    low: float = 0.0
    high: float = 1.0
    caption: str = ""
    kind: Literal["heatmap"] = dataclasses.field(default="heatmap", init=False)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row.

    Attributes:
        numeric: columns after the first hold numbers, and are set flush right.
        best: (row, column) of the cells to stand out.
        colours: number of the colour of each row, shown beside its name; None for no colours.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: bool = True
    best: Sequence[tuple[int, int]] = ()
    colours: Sequence[int] | None = None
    kind: Literal["table"] = dataclasses.field(default="table", init=False)


@dataclasses.dataclass(frozen=True)
class Text:
    """Text as it is, such as a sample or a config.

    Attributes:
        folded: shown, and printed, only when its title has been opened.
    """

    title: str
    text: str
    folded: bool = False
    kind: Literal["text"] = dataclasses.field(default="text", init=False)


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, a sentence, and what is below it."""

    title: str
    blocks: Sequence[Table | Chart | HeatMap | Text]
    lead: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """A whole page.

    Attributes:
        summary: one paragraph.
        notes: what the reader should know of the data: what is missing, unreadable or in progress.
        data: numbers for programs, such as one record for each run; not on the page.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

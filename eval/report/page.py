"""A report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import datetime
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from eval.report import charts, heatmaps, words
from eval.report.document import Report, Series

HERE = pathlib.Path(__file__).parent


def render(report: Report, data_name: str = "") -> str:
    """The page.

    Args:
        data_name: of the JSON file beside it, to link to.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["groupby_order"] = neighbours
    environment.globals |= {
        "draw": charts.draw,
        "draw_heatmap": heatmaps.draw,
        "legend": charts.legend,
        "key": _key,
        "missing": words.MISSING,
    }
    return environment.get_template("page.html.j2").render(
        report=report,
        style=Markup((HERE / "style.css").read_text()),
        data_name=data_name,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def neighbours(blocks: Sequence[Any], attribute: str) -> list[tuple[str, list[Any]]]:
    """Blocks that follow each other with the same ``attribute``, so that charts can stand side by side."""
    groups = itertools.groupby(blocks, key=lambda block: getattr(block, attribute))
    return [(name, list(group)) for name, group in groups]


def _key(colour: int) -> Markup:
    return Markup(charts.key(Series("", [], [], colour=colour)))

"""Reports: one self-contained HTML file for one run or a comparison of several, with its data beside it.

``python -m eval.report RUN [RUN...] [--out=FILE.html]``, or ``write(["runs/a", "runs/b"], "ab.html")``. A
study with numbers of its own builds a ``document.Report`` and calls ``save``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from etils import epath

from eval.opened import RunError
from eval.report.compare import compare
from eval.report.document import Report
from eval.report.gather import Run, read_run
from eval.report.page import render
from runtime.run_record import replace_text
from runtime.writers import to_json


def write(workdirs: Sequence[epath.PathLike], out: epath.PathLike | None = None) -> epath.Path:
    """Writes the report of the runs in ``workdirs`` and returns its path.

    Args:
        out: FILE.html; the data go to FILE.json. None: report.html, in the run if it is only one.

    Raises:
        RunError: none of them can be read. If some can, the others are listed in the report.
        ValueError: ``out`` does not end in .html.
    """
    return save(of_runs(workdirs), out or default_out(workdirs))


def default_out(workdirs: Sequence[epath.PathLike]) -> epath.Path:
    """report.html: inside the run if there is only one, else in the current directory."""
    return (epath.Path(workdirs[0]) if len(workdirs) == 1 else epath.Path()) / "report.html"


def of_runs(workdirs: Sequence[epath.PathLike]) -> Report:
    """The report of the runs in ``workdirs``; a directory named twice counts once.

    Raises:
        RunError: none of them can be read.
    """
    runs: list[Run] = []
    unreadable: dict[str, str] = {}
    for workdir in {str(epath.Path(w).resolve()): w for w in workdirs}.values():
        try:
            runs.append(read_run(workdir))
        except RunError as error:
            unreadable[str(workdir)] = str(error)
    if not runs:
        raise RunError("\n".join(unreadable.values()) or "there is no run to report; give a directory")
    return compare(runs, unreadable)


def save(report: Report, out: epath.PathLike) -> epath.Path:
    """Writes ``report`` to ``out`` (FILE.html) and its data, with all that is drawn, to FILE.json.

    Raises:
        ValueError: ``out`` does not end in .html.
    """
    path = epath.Path(out)
    if path.suffix != ".html":
        raise ValueError(f"--out={path} should end in .html; the data go to the same name with .json")
    data = path.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    page, numbers = render(report, data.name), to_json(dataclasses.asdict(report))
    replace_text(data, json.dumps(numbers, indent=1) + "\n")
    replace_text(path, page)
    return path

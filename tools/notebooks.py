"""Run the notebooks and keep what they show: ``python -m tools.notebooks [NAME ...] [--size=default]``.

``notebooks/NAME.py`` (jupytext, percent format) is the source; NAME.ipynb beside it is made here, its outputs
from a run of every cell in a fresh kernel. Runs lie in ``--workdir``, by default ``runs/`` of the repository.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "notebooks"
SIZES = ("smoke", "default", "full")


def names() -> list[str]:
    """Of all notebooks."""
    return sorted(path.stem for path in SOURCES.glob("*.py"))


def read(name: str) -> Any:
    """The source of ``name`` as a notebook without outputs.

    Raises:
        FileNotFoundError: there is no such notebook; the message lists them.
    """
    path = SOURCES / f"{name}.py"
    if not path.exists():
        raise FileNotFoundError(f"there is no notebook {name!r}; there are {', '.join(names())}")
    notebook = jupytext.read(path)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{number}"  # jupytext draws them
    return notebook


def execute(notebook: Any, size: str, directory: Path) -> Any:
    """``notebook`` with the outputs of a run in ``directory``.

    Raises:
        CellExecutionError: a cell failed; the message has its source and the traceback.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "NOTEBOOK_SIZE": size, "PYTHONPATH": os.pathsep.join(paths)}
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(directory)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = tidy(cell.outputs)
    return notebook


def tidy(outputs: Sequence[Any]) -> list[Any]:
    """What a reader needs: text as text, in one piece; pictures; and no warnings of libraries."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        data = output.get("data", {})
        if output.output_type == "display_data" and "image/png" not in data:  # rich shows lines as HTML
            output = nbformat.v4.new_output(
                "stream", name="stdout", text=data["text/plain"].rstrip("\n") + "\n"
            )
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def cpu_seconds() -> float:
    """Of all kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("python -m tools.notebooks", allow_abbrev=False)
    options.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())} (default: all)")
    options.add_argument("--size", choices=SIZES, default="default")
    options.add_argument("--workdir", type=Path, default=ROOT, help="where their runs/ lies")
    given = options.parse_args(argv)
    try:
        for name in given.names or names():
            begin, worked = time.perf_counter(), cpu_seconds()
            notebook = execute(read(name), given.size, given.workdir)
            nbformat.write(notebook, SOURCES / f"{name}.ipynb")
            wall, cpu = time.perf_counter() - begin, cpu_seconds() - worked
            print(f"{name}: {wall:.0f} s, {cpu:.0f} s of the processor", flush=True)
    except (FileNotFoundError, CellExecutionError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()

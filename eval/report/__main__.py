"""``python -m eval.report RUN [RUN...] [--out=FILE.html]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eval import report
from eval.opened import RunError


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m eval.report", allow_abbrev=False)
    options.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, finished or not")
    options.add_argument(
        "--out", help="FILE.html (default: report.html, inside the run if there is only one)"
    )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    given = parser().parse_args(argv)
    try:
        made = report.of_runs(given.runs)
        path = report.save(made, given.out or report.default_out(given.runs))
    except (RunError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{path}, data in {path.with_suffix('.json')}")


if __name__ == "__main__":
    main()

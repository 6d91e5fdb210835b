"""Which files a path, directory or glob names."""

from __future__ import annotations

import fnmatch
import glob
import os
import re

from etils import epath

ACCEPTED = (
    "'stdlib' (Python's own source), 'books', 'packages' (installed ones), a file, a directory or a glob of "
    "bytes, a directory of python -m tools.prepare, or token arrays: *.npy, or raw *.bin with "
    "task.token_dtype and task.vocab_size"
)


def find_files(field: str, source: str, pattern: str = "") -> tuple[epath.Path, list[str]]:
    """The root and the sorted relative paths of the files of a path, directory or glob.

    Raises:
        FileNotFoundError: naming ``field``, when there are none.
    """
    expanded = os.path.expanduser(source)
    path, wildcard = epath.Path(expanded), re.search(r"[*?\[]", expanded)
    if wildcard and not path.exists():
        head = expanded[: wildcard.start()].rpartition("/")[0]
        root = epath.Path(head or ("/" if expanded.startswith("/") else "."))
        if "://" in expanded:
            found = list(root.glob(expanded[len(head) + 1 :]))
        else:
            found = [epath.Path(p) for p in glob.glob(expanded, recursive=True)]
    elif path.is_dir():
        root, found = path, [folder / name for folder, _, names in path.walk() for name in names]
    elif path.exists():
        return path.parent, [path.name]
    else:
        raise FileNotFoundError(f"{field}={source!r}: {path} does not exist. Sources are {ACCEPTED}")
    relative = [p.relative_to(root) for p in found if fnmatch.fnmatch(p.name, pattern or "*")]
    visible = [r for r in relative if not any(part.startswith(".") for part in r.parts)]
    paths = sorted(r.as_posix() for r in visible if (root / r).is_file())
    if not paths:
        raise FileNotFoundError(
            f"{field}={source!r}: no file in {root} matches (pattern {pattern!r}; hidden files are "
            f"skipped). Sources are {ACCEPTED}"
        )
    return root, paths

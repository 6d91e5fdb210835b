"""The source of Python's own standard library: about 11 MB of text that every machine already has.

The split is by package, so that no validation text has a sibling file in training. Validation is ordinary
code of many kinds; generated tables and build-time files are never validated on. Bytes differ between Python
versions, hence a manifest with hashes (`tasks.manifest`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "lib-dynload",
}
# Written by the build or the machine's owner: not the same text on every machine.
SKIPPED_NAMES = ("_sysconfigdata*", "config-*", "sitecustomize*", "usercustomize*")

# Present in Python 3.11 to 3.14, each below 60 KB, without a near twin elsewhere in the library. The order
# matters only for a stripped-down library, where the first ones that are present are taken.
VALIDATION_PACKAGES = (
    "json",  # data formats
    "configparser",
    "csv",
    "plistlib",
    "tomllib",
    "smtplib",  # network
    "wsgiref",
    "selectors",
    "statistics",  # mathematics and algorithms
    "heapq",
    "graphlib",
    "queue",
    "sched",
    "textwrap",  # text
    "shlex",
    "gettext",
    "tempfile",  # files and dates
    "filecmp",
    "zoneinfo",
    "dis",  # language and development tools
    "timeit",
    "curses",
)
# Tables and other text that no one typed: training only.
TABLES = {
    *("encodings", "html", "keyword", "lib2to3", "locale", "mimetypes", "opcode", "pydoc_data", "re"),
    *("sre_constants", "stat", "stringprep", "symbol", "this", "token", "turtledemo"),
}
# Shares of all bytes: stop adding preferred packages above the first; add others by hash below the second.
MOST, LEAST = 0.08, 0.03


def package(path: str) -> str:
    """The top-level package or module that a file belongs to: ``json/decoder.py -> json``."""
    first = PurePosixPath(path).parts[0]
    return first.removesuffix(".py")


def find_files(root: Path, pattern: str = "*.py") -> list[str]:
    """Sorted paths below ``root`` of the library's own files: no tests, no installed packages."""
    paths = []
    for folder, folders, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [(relative / name).as_posix() for name in names if fnmatch.fnmatch(name, pattern)]
    return sorted(p for p in paths if not any(fnmatch.fnmatch(p.split("/")[0], n) for n in SKIPPED_NAMES))


def choose_validation(sizes: Mapping[str, int]) -> list[str]:
    """Packages held out, given the bytes of each: the preferred ones that are present, and, in a library that
    has few of them, others of ordinary size in the order of their names' sha256."""
    total = sum(sizes.values())
    chosen: list[str] = []
    for name in VALIDATION_PACKAGES:
        if name in sizes and sum(sizes[c] for c in [*chosen, name]) <= MOST * total:
            chosen.append(name)
    others = [n for n in sizes if n not in TABLES and not n.startswith("_") and n not in VALIDATION_PACKAGES]
    for name in sorted(others, key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
        if sum(sizes[c] for c in chosen) >= LEAST * total:
            break
        if sizes[name] <= (MOST - LEAST) * total:
            chosen.append(name)
    return sorted(chosen)


def load(pattern: str = "") -> tuple[str, dict[str, bytes], set[str], dict[str, Any]]:
    """Read the library: (root, {path: bytes}, the held-out paths, the rule for the manifest).

    Raises:
        FileNotFoundError: the library is not installed as files, or no file matches ``pattern``.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = find_files(root, pattern or "*.py")
    if not paths:
        raise FileNotFoundError(
            f"task.source='stdlib': no file named {pattern or '*.py'!r} in {root} (a Python whose library is "
            "zipped or stripped has none); set task.source to a file or directory"
        )
    files = {path: (root / path).read_bytes() for path in paths}
    sizes: Counter[str] = Counter()
    for path, data in files.items():
        sizes[package(path)] += len(data)
    held_out = choose_validation(sizes)
    rule = {
        "split": "by top-level package",
        "python": platform.python_version(),
        "pattern": pattern or "*.py",
        "validation_packages": held_out,
    }
    return str(root), files, {p for p in paths if package(p) in held_out}, rule

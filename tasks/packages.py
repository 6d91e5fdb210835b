"""Long documents without a download: the installed Python packages, each one document of all its source."""

from __future__ import annotations

import fnmatch
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.books import held_out

SKIPPED = {"__pycache__", "test", "tests", "testing"}
SHORTEST = 64 * 1024  # bytes; smaller packages are no long documents
LONGEST = 4 * 1024 * 1024  # a larger package is cut between files into parts of at most about this


def load(pattern: str = "") -> tuple[str, dict[str, bytes], set[str], dict[str, Any]]:
    """Read them: (root, {package or package#part: bytes}, the held-out names, the rule for the manifest).

    Every file stands behind a line with its path. What is installed differs between machines, so numbers on
    this source compare within one environment only (the manifest has sizes and hashes).

    Args:
        pattern: of the package names; empty for all.

    Raises:
        FileNotFoundError: fewer than two packages are long enough.
    """
    root = Path(sysconfig.get_paths()["purelib"])
    folders = sorted(p for p in root.iterdir() if p.is_dir() and fnmatch.fnmatch(p.name, pattern or "*"))
    packages = {folder.name: list(_parts(folder)) for folder in folders if folder.name not in SKIPPED}
    long = {name: parts for name, parts in packages.items() if sum(map(len, parts)) >= SHORTEST}
    if len(long) < 2:
        raise FileNotFoundError(
            f"task.source='packages' (task.pattern={pattern!r}): {len(long)} packages in {root} have "
            f"{SHORTEST} bytes of source, and two are needed, to learn from and to validate on"
        )
    chosen = held_out({name: sum(map(len, parts)) for name, parts in long.items()}, share=0.04)
    documents = {
        name if len(parts) == 1 else f"{name}#{i}": part
        for name, parts in long.items()
        for i, part in enumerate(parts)
    }
    validation = {d for d in documents if d.split("#")[0] in chosen}
    rule = {
        "split": "whole packages by sha256 of the name, 4% of the bytes",
        "pattern": pattern,
        "validation_packages": sorted(chosen),
    }
    return str(root), documents, validation, rule


def _parts(folder: Path) -> Iterator[bytes]:
    """The package's source in the order of its paths, cut between files above ``LONGEST``."""
    part, size = list[bytes](), 0
    for path in _files(folder):
        text = b"# " + path.relative_to(folder.parent).as_posix().encode() + b"\n" + path.read_bytes() + b"\n"
        if part and size + len(text) > LONGEST:
            yield b"".join(part)
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield b"".join(part)


def _files(folder: Path) -> list[Path]:
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED]
        found += [Path(place, name) for name in names if name.endswith(".py")]
    return sorted(found)

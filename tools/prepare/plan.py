"""What is read, in which order, and in which pieces: a function of the settings and of the files' sizes only.

A file longer than a piece is cut near multiples of the piece size: after the document separator, else after a
line that neither ends nor is followed by white space (byte-level tokenizers see the same words on either side
of such a cut), else after any line, else between characters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator

from etils import epath

from tasks import sources, stdlib
from tasks.files import find_files

SIDES = ("train", "validation")
# A longer text is cut into several documents: positions in a document must stay below 2^24.
PIECES_PER_DOCUMENT, LONGEST_PIECE = 8, 2**20
CLEAN_LINE = re.compile(rb"[!-~]\n(?=[!-~])")


class PrepareError(RuntimeError):
    """The corpus cannot be prepared; the message names the option or the file."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One ``--source``: where it is, and its weight in the mixture (None for its own size)."""

    name: str
    path: str
    weight: float | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes of a file from about ``start`` to about ``stop`` (see `read_piece`).

    Attributes:
        opens, closes: whether a document begins and ends here wherever the cuts fall.
    """

    source: str
    path: str
    start: int
    stop: int
    size: int  # of the file
    opens: bool
    closes: bool


@dataclasses.dataclass(frozen=True)
class Stream:
    """The files of one side of one source: ``(path, size, start, stop)`` of what is read of each."""

    side: str
    source: str
    ranges: tuple[tuple[str, int, int, int], ...]

    @property
    def bytes(self) -> int:
        """Bytes to be read."""
        return sum(stop - start for _, _, start, stop in self.ranges)


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of one source: by side, their number and bytes, a hash of their names and sizes, and how the
    sides were split."""

    source: Source
    streams: tuple[Stream, Stream]
    files: int
    bytes: int
    digest: str
    split: str


def parse_source(text: str) -> Source:
    """``stdlib``, ``PATH`` or ``NAME:PATH:WEIGHT``.

    Raises:
        PrepareError: the weight is not positive.
    """
    named = re.fullmatch(r"([\w.-]+):(.+):([^:/]+)", text)
    if not named:
        name = re.sub(r"[^\w.-]+", "_", text.rstrip("/").rpartition("/")[2]).strip("_.") or "text"
        return Source(name, text, None)
    name, path, weight = named.groups()
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise PrepareError(f"--source={text}: the weight {weight!r} should be a positive number")
    return Source(name, path, value)


def parse_sources(texts: list[str]) -> list[Source]:
    """Raises PrepareError: none, two of one name, or only some with a weight."""
    if not texts:
        raise PrepareError("--source is missing: 'stdlib', a path, a glob, or NAME:PATH:WEIGHT")
    parsed = [parse_source(text) for text in texts]
    names = [source.name for source in parsed]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PrepareError(f"--source: two are named {twice[0]!r}; name them apart with NAME:PATH:WEIGHT")
    bare = [source.name for source in parsed if source.weight is None]
    if bare and len(bare) < len(parsed):
        raise PrepareError(f"--source={bare[0]} has no weight, but others have; give all a weight, or none")
    return parsed


def list_files(source: Source, pattern: str, eval_fraction: float) -> Listing:
    """Files of ``source`` and their sides: the standard library by package, other files by a hash of their
    paths, a single file by its tail.

    Raises:
        PrepareError: nothing is there, or too little for two sides.
    """
    held_out: set[str]
    if source.path == "stdlib":
        folder, library, held_out, _ = stdlib.load(pattern)
        root, sizes, split = epath.Path(folder), {p: len(data) for p, data in library.items()}, "by package"
    else:
        try:
            root, paths = find_files("--source", source.path, pattern)
        except FileNotFoundError as error:
            raise PrepareError(str(error)) from error
        sizes = {p: size for p in paths if (size := (root / p).stat().length)}
        held_out, split = sources.held_out(list(sizes), eval_fraction), "by sha256 of the path"
    ranges: dict[str, list[tuple[str, int, int, int]]] = {side: [] for side in SIDES}
    for path, size in sizes.items():
        side = "validation" if path in held_out else "train"
        ranges[side].append((str(root / path), size, 0, size))
    if len(sizes) == 1:
        ((path, size, _, _),) = ranges["train"]
        at, split = size - int(size * eval_fraction), "tail of the file"
        ranges = {"train": [(path, size, 0, at)], "validation": [(path, size, at, size)]}
    digest = hashlib.sha256("".join(f"{p}\0{n}\n" for p, n in sizes.items()).encode()).hexdigest()
    train, validation = (Stream(side, source.name, tuple(ranges[side])) for side in SIDES)
    for stream in (train, validation):
        if not stream.bytes:
            raise PrepareError(
                f"--source={source.path}: {sum(sizes.values())} bytes in {len(sizes)} files leave nothing "
                f"for the {stream.side} side at --eval_fraction={eval_fraction}"
            )
    return Listing(source, (train, validation), len(sizes), sum(sizes.values()), digest, split)


def jobs(stream: Stream, piece_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Pieces in order, small files together: about ``piece_bytes`` a job, and never more."""
    job: list[Piece] = []
    room = piece_bytes
    for path, size, begin, end in stream.ranges:
        for number, start in enumerate(range(begin, end, piece_bytes)):
            stop = min(start + piece_bytes, end)
            opens = number % PIECES_PER_DOCUMENT == 0
            closes = (number + 1) % PIECES_PER_DOCUMENT == 0 or stop == end
            if stop - start > room:
                yield tuple(job)
                job, room = [], piece_bytes
            job.append(Piece(stream.source, path, start, stop, size, opens, closes))
            room -= stop - start
    if job:
        yield tuple(job)


def read_piece(piece: Piece, piece_bytes: int, separator: bytes) -> tuple[bytes, bool, bool]:
    """(the bytes of ``piece``, whether a document begins with them, whether one ends with them).

    The pieces of a file, in order, are the file: every cut depends on the file and the place only.
    """
    with epath.Path(piece.path).open("rb") as file:
        file.seek(piece.start)
        data = file.read(piece.stop + piece_bytes - piece.start)
    begin, opens = (0, True) if piece.start == 0 else _cut(data[:piece_bytes], separator)
    if piece.stop == piece.size:
        return data[begin:], opens or piece.opens, True
    length = piece.stop - piece.start
    end, closes = _cut(data[length : length + piece_bytes], separator)
    return data[begin : length + end], opens or piece.opens, closes or piece.closes


def _cut(window: bytes, separator: bytes) -> tuple[int, bool]:
    """Where to cut in the bytes that follow a place, and whether a separator stands before the cut."""
    if separator and (found := window.find(separator)) >= 0:
        return found + len(separator), True
    if clean := CLEAN_LINE.search(window):
        return clean.end(), False
    if (line := window.find(b"\n")) >= 0:
        return line + 1, False
    # Bytes 10xxxxxx continue a UTF-8 character.
    return next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0), False

"""Pathfinder images as the Long Range Arena released them (arXiv:2011.04006), read once and kept.

    DIRECTORY/pathfinder32/curv_contour_length_14/imgs/SUBDIRECTORY/sample_N.png
    DIRECTORY/pathfinder32/curv_contour_length_14/metadata/SUBDIRECTORY.npy

The files of metadata are text, whatever their name says: a line an image, of which the first, second and
fourth words are its directory, its name and its label. (The generator itself writes arrays; both are read.)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.lra.examples import Images, Scale, Subset
from tasks.lra.types import LRAData
from tasks.manifest import cache_path
from tasks.shards import generate, key

FOLDERS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}
NAMES = {32: "pathfinder", 128: "pathx", 256: "path256"}
PUBLISHED_EMPTY = "pathfinder32/curv_baseline/imgs/0/sample_172.png"
SHARES, SPLIT_SEED = {"train": 0.8, "validation": 0.1, "test": 0.1}, 42
OBTAIN = (
    "download and unpack lra_release.gz of the Long Range Arena, and set directory to the one that has "
    "pathfinder32, pathfinder64, pathfinder128 and pathfinder256 in it"
)


@dataclasses.dataclass(frozen=True)
class Listing:
    """Images of a folder, in the order of the metadata; and those left out for being the known empty one."""

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    empty: int

    @property
    def digest(self) -> str:
        """SHA-256 of paths and labels."""
        return hashlib.sha256(repr((self.paths, self.labels)).encode()).hexdigest()


def load(
    directory: str,
    *,
    resolution: int = 32,
    contour_length: int = 14,
    continuous: bool = True,
    cache_dir: str = "",
    workers: int | None = None,
) -> LRAData:
    """80 / 10 / 10 % of the images of one folder, in a random order (seed 42).

    Args:
        continuous: inputs in [0, 1] of one channel; otherwise ids 0..255.
        cache_dir, workers: of `tasks.manifest.cache_path` and `tasks.shards.generate`.

    Raises:
        FileNotFoundError: a folder or images are missing; says how many.
        ValueError: a line of metadata, or an image, that is not what it should be; names it.
    """
    if contour_length not in FOLDERS:
        raise ValueError(f"contour_length={contour_length} should be one of {sorted(FOLDERS)}")
    folder = Path(directory).expanduser() / f"pathfinder{resolution}" / FOLDERS[contour_length]
    found = listing(str(folder))
    content = {"folder": str(folder.resolve()), "images": found.digest}
    shards = generate(
        cache_path(cache_dir, f"{folder.parent.name}-{folder.name}-{key(content)}"),
        content,
        len(found.paths),
        functools.partial(_read, str(folder), resolution),
        workers=workers,
    )
    images = Images(shards, Scale() if continuous else None)
    parts = split(len(shards))
    return LRAData(
        NAMES.get(resolution, f"pathfinder{resolution}"),
        {name: Subset(images, order) for name, order in parts.items()},
        classes=2,
        vocab_size=None if continuous else 256,
        channels=1 if continuous else 0,
        seq_len=resolution**2,
        class_names=("apart", "connected"),
        counts={
            name: {"examples": len(order), "empty images skipped": found.empty if name == "train" else 0}
            for name, order in parts.items()
        },
        notes=(
            f"read from {folder}",
            "80/10/10 % in an own random order (seed 42): published splits are other orders of the images",
        ),
    )


def split(count: int) -> dict[str, np.ndarray]:
    """Numbers of the images on each side."""
    order = np.random.default_rng(SPLIT_SEED).permutation(count)
    first, second = round(SHARES["train"] * count), round((SHARES["train"] + SHARES["validation"]) * count)
    sides = (order[:first], order[first:second], order[second:])
    return dict(zip(SHARES, map(np.sort, sides)))


@functools.lru_cache(maxsize=4)
def listing(folder: str) -> Listing:
    """What the metadata of ``folder`` names, all of it there.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    root = Path(folder)
    files = sorted((root / "metadata").glob("*.npy"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise FileNotFoundError(f"{root / 'metadata'} has no *.npy: {OBTAIN}")
    there = {
        f"imgs/{subdirectory.name}/{image.name}": image.stat().st_size
        for subdirectory in sorted((root / "imgs").glob("*"))
        for image in subdirectory.iterdir()
    }
    rows = [row for file in files for row in _rows(file)]
    missing = [path for path, _ in rows if path not in there]
    if missing:
        raise FileNotFoundError(
            f"{root}: {len(missing)} of the {len(rows)} images in its metadata are missing, the first "
            f"{missing[0]}; unpack the release again"
        )
    empty = [path for path, _ in rows if not there[path]]
    unexpected = [path for path in empty if not f"{root}/{path}".endswith(PUBLISHED_EMPTY)]
    if unexpected:
        raise ValueError(
            f"{root}: {len(unexpected)} of {len(rows)} images are empty files, the first {unexpected[0]}; "
            f"the release has a single one, {PUBLISHED_EMPTY}. Unpack it again"
        )
    kept = [(path, label) for path, label in rows if there[path]]
    return Listing(tuple(path for path, _ in kept), tuple(label for _, label in kept), len(empty))


def _rows(file: Path) -> list[tuple[str, int]]:
    """(path, label) of every image of a metadata file."""
    if file.read_bytes()[:6] == b"\x93NUMPY":
        lines = [[str(word) for word in row] for row in np.load(file, allow_pickle=False)]
    else:
        lines = [line.split() for line in file.read_text().splitlines()]
    rows = []
    for number, words in enumerate(lines, 1):
        if not words:
            continue
        if len(words) < 4 or words[3] not in ("0", "1"):
            raise ValueError(
                f"{file}, line {number}: {' '.join(words)[:80]!r} should be 'directory name number label "
                "...' with a label of 0 or 1"
            )
        rows.append((f"{words[0]}/{words[1]}", int(words[3])))
    return rows


def _read(folder: str, resolution: int, start: int, stop: int) -> dict[str, np.ndarray]:
    found = listing(folder)
    images = np.zeros((stop - start, resolution, resolution), np.uint8)
    for image, path in zip(images, found.paths[start:stop]):
        name = f"{folder}/{path}"
        try:
            with Image.open(name) as opened:
                pixels = np.asarray(opened)
        except OSError as error:
            raise ValueError(
                f"{name} cannot be read as an image ({error}); unpack the release again"
            ) from error
        if pixels.shape != image.shape or pixels.dtype != np.uint8:
            raise ValueError(
                f"{name} is {pixels.dtype} {pixels.shape}, but should be {image.dtype} {image.shape} (grey)"
            )
        image[:] = pixels
    return {"images": images, "labels": np.array(found.labels[start:stop], np.int32)}

"""Which files a byte corpus was made of: path, size, hash and side of the split of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import uuid
from typing import Any

from etils import epath


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file: path below the source, size, sha256, and side: "train", "validation" or "both" (cut)."""

    path: str
    bytes: int
    sha256: str
    split: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of a corpus and the rule that split them."""

    source: str
    rule: dict[str, Any]
    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """sha256 of the rule and of every file's path, hash and side: equal digests mean equal data."""
        content = [self.rule, [(f.path, f.sha256, f.split) for f in self.files]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def bytes(self, split: str) -> int:
        """Bytes of the files on one side."""
        return sum(f.bytes for f in self.files if f.split == split)

    def write(self, cache_dir: str) -> epath.Path:
        """Write ``manifest-<digest>.json`` into the cache directory and return its path."""
        content = {**dataclasses.asdict(self), "digest": self.digest}
        return write_cache(cache_dir, f"manifest-{self.digest[:16]}.json", content)


def cache_path(cache_dir: str, name: str) -> epath.Path:
    """``cache_dir/name``; an empty ``cache_dir`` means ``~/.cache/longspan``."""
    return epath.Path(cache_dir or "~/.cache/longspan").expanduser() / name


def write_cache(cache_dir: str, name: str, content: Any) -> epath.Path:
    """Write JSON by atomic rename, so that processes writing at once cannot mix; a cache that cannot be
    written is only warned of."""
    path = cache_path(cache_dir, name)
    temporary = path.parent / f".{name}.{os.getpid()}.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)
    except OSError as error:
        logging.warning("could not write %s (%s); set task.cache_dir to a writable directory", path, error)
    return path


def read_cache(cache_dir: str, name: str) -> Any | None:
    """The JSON written by `write_cache`, or None when there is none."""
    try:
        return json.loads(cache_path(cache_dir, name).read_text())
    except (OSError, ValueError):
        return None

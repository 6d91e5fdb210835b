"""Files written whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_json(path: Path, content: Any) -> None:
    """As `replace_bytes`."""
    replace_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file: a reader, or a crash, sees either the old one or the new one."""
    temporary = path.parent / f".{path.name}.tmp"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

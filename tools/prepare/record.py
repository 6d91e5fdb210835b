"""The record of a preparation: progress.json while it goes on, manifest.json in its place when it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tasks.prepared import FORMAT, MANIFEST, PROGRESS, TOKENIZER, Shard, check_size
from tools.prepare.encode import Skipped
from tools.prepare.files import replace_json, sha256
from tools.prepare.plan import PrepareError

Settings = dict[str, Any]


@dataclasses.dataclass
class Progress:
    """What is done: the first ``jobs`` jobs are in ``shards``, the files ``skipped`` aside."""

    settings: Settings
    jobs: int = 0
    shards: list[Shard] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    byte_exact: bool = True

    def save(self, directory: Path) -> None:
        """Replaces progress.json."""
        replace_json(directory / PROGRESS, {"format": FORMAT, **dataclasses.asdict(self)})


def open_progress(directory: Path, settings: Settings) -> Progress:
    """The progress of ``directory``, which may be new.

    Raises:
        PrepareError: it holds something else, or what it holds was started with other settings.
    """
    for name in (MANIFEST, PROGRESS):
        if (directory / name).exists():
            content = json.loads((directory / name).read_text())
            if content.get("format") != FORMAT:
                raise PrepareError(f"--out={directory}: {name} in it is not of a prepared corpus")
            _refuse_others(directory, settings, content["settings"])
            if name == PROGRESS:
                return Progress(
                    settings,
                    content["jobs"],
                    [Shard(**entry) for entry in content["shards"]],
                    [Skipped(**entry) for entry in content["skipped"]],
                    content["byte_exact"],
                )
            raise FileExistsError(directory / name)
    if directory.exists() and any(directory.iterdir()):
        raise PrepareError(
            f"--out={directory} is not empty, and holds no prepared corpus; name a new directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    progress = Progress(settings)
    progress.save(directory)
    return progress


def _refuse_others(directory: Path, new: Settings, old: Settings) -> None:
    before, after = _flat(old), _flat(json.loads(json.dumps(new)))
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) != after.get(field):
            raise PrepareError(
                f"--out={directory} was started with {field} = {before.get(field)!r}, but it is "
                f"{after.get(field)!r} now; give the same options and files, or another --out"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of the leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return leaves


def finish(
    directory: Path, progress: Progress, sources: list[dict[str, Any]], vocabulary: Any
) -> dict[str, Any]:
    """Write the manifest and return it; ``vocabulary`` is (vocab_size, separator_id, dtype).

    Raises:
        PrepareError: no text on one of the sides.
    """
    shards = progress.shards
    for side in ("train", "validation"):
        if not any(s.side == side for s in shards):
            why = (
                f"; {len(progress.skipped)} were skipped, the first {progress.skipped[0]}"
                if progress.skipped
                else ""
            )
            raise PrepareError(f"there is no text for the {side} side in the files of --source{why}")
    train = [s for s in shards if s.side == "train"]
    tokenizer = directory / TOKENIZER
    vocab_size, separator_id, dtype = vocabulary
    for source in sources:
        source["skipped_bytes"] = sum(s.bytes for s in progress.skipped if s.source == source["name"])
    manifest = {
        "format": FORMAT,
        "settings": progress.settings,
        "tokenizer": {
            "sha256": sha256(tokenizer) if tokenizer.exists() else None,
            "vocab_size": vocab_size,
            "separator_id": separator_id,
        },
        "dtype": dtype,
        "byte_exact": progress.byte_exact,
        "bytes_per_token": sum(s.bytes for s in train) / sum(s.tokens - 1 for s in train),
        "digest": hashlib.sha256("".join(s.sha256 + s.starts_sha256 for s in shards).encode()).hexdigest(),
        "sources": sources,
        "skipped": [dataclasses.asdict(s) for s in progress.skipped],
        "shards": [dataclasses.asdict(s) for s in shards],
    }
    replace_json(directory / MANIFEST, manifest)
    (directory / PROGRESS).unlink()
    return manifest


def verify(directory: Path) -> int:
    """Hash all files of a finished corpus again; the number of shards.

    Raises:
        PrepareError: there is no finished corpus, or a file is not the one that was written; names it.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise PrepareError(f"--out={directory}: there is no {MANIFEST}; the preparation was not finished")
    manifest = json.loads(path.read_text())
    expected: dict[str, str] = {}
    for shard in (Shard(**entry) for entry in manifest["shards"]):
        check_size(
            epath.Path(directory) / f"{shard.name}.bin", shard.tokens * np.dtype(manifest["dtype"]).itemsize
        )
        expected |= {f"{shard.name}.bin": shard.sha256, f"{shard.name}.starts.npy": shard.starts_sha256}
    if manifest["tokenizer"]["sha256"]:
        expected[TOKENIZER] = manifest["tokenizer"]["sha256"]
    for name, digest in expected.items():
        if (found := sha256(directory / name)) != digest:
            raise PrepareError(f"{directory / name}: its sha256 is {found}, but {MANIFEST} says {digest}")
    return len(manifest["shards"])

"""From a source to a training and a validation corpus.

A source is "stdlib", "books" or "packages" (what is installed); a file, directory or glob of bytes; a
directory of `tools.prepare`; or token arrays (``*.npy``, raw ``*.bin``). Paths may be local or remote
(``gs://``); local token arrays are memory-mapped, all else is read into memory.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from tasks import books, packages, prepared, stdlib, token_arrays
from tasks.corpus import Corpus
from tasks.files import ACCEPTED, find_files
from tasks.manifest import FileEntry, Manifest
from tasks.plant import PlantConfig, plant
from tasks.prepared import Prepared
from tasks.tokenizer import ByteTokenizer

# Text that is installed: each gives (root, {name: bytes}, the held-out names, the rule for the manifest).
INSTALLED = {"stdlib": stdlib.load, "books": books.load, "packages": packages.load}


@dataclasses.dataclass
class SourceConfig:
    """Where text comes from and what is held out.

    Attributes:
        source: "stdlib", "books" or "packages" (long documents), or a path: file, directory (read
            recursively, hidden files skipped) or glob; or a directory of `tools.prepare`, which knows all
            but ``max_train_tokens`` itself. Empty: none, in a run made from a published checkpoint.
        pattern: names of the files read, as in "*.txt"; empty: "*.py" for the library, all of a directory.
        token_dtype: dtype of the ids in raw ``*.bin`` token arrays.
        vocab_size: number of ids of token arrays; byte sources have 257.
        separator_id: the id that opens (or closes) documents in token arrays; None: an array is one document.
        bytes_per_token: of token arrays, where known: gives them bits per byte.
        eval_source: what is validated on instead of a part of ``source``; a path like ``source``.
        eval_fraction: share held out of ``source``: of a directory's files (by a hash of their paths), the
            tail of a single file and of token arrays. The library has its own split, by package.
        max_train_tokens: at most this many training targets, for quick tests; the beginning of the corpus
            in a fixed shuffled order of documents.
        plant: facts planted into byte sources, needed again at chosen distances; see `tasks.plant`.
        cache_dir: where manifests and reference numbers are kept; empty: ``~/.cache/longspan``.
    """

    source: str = "stdlib"
    pattern: str = ""
    token_dtype: str = "uint16"
    vocab_size: int | None = None
    separator_id: int | None = None
    bytes_per_token: float | None = None
    eval_source: str = ""
    eval_fraction: float = 0.05
    max_train_tokens: int | None = None
    plant: PlantConfig = dataclasses.field(default_factory=PlantConfig)
    cache_dir: str = ""


@dataclasses.dataclass(frozen=True)
class Splits:
    """The two sides of a source. ``manifest`` is None, and ``separator_id`` may be, for token arrays;
    ``prepared`` is None but for a corpus of `tools.prepare`."""

    train: Corpus
    validation: Corpus
    vocab_size: int
    separator_id: int | None
    manifest: Manifest | None
    prepared: Prepared | None = None


def load(config: SourceConfig) -> Splits:
    """Read ``config.source`` and split it.

    Raises:
        FileNotFoundError: a source does not exist or no file matches.
        ValueError: nothing on one of the sides, an impossible fraction, or unusable token arrays.
    """
    if not config.source:
        raise FileNotFoundError(
            "task.source is empty: a run made from a published checkpoint has no text. Prepare some with its "
            "tokenizer (python -m tools.prepare --source=TEXT --tokenizer=RUN/tokenizer.json --out=CORPUS), "
            "and give task.source=CORPUS"
        )
    splits = _load(config)
    for name, corpus in (("training", splits.train), ("validation", splits.validation)):
        if not corpus.targets:
            raise ValueError(
                f"task.source={config.source!r}: the {name} side is empty "
                f"(task.eval_source={config.eval_source!r}, task.eval_fraction={config.eval_fraction}). "
                f"Sources are {ACCEPTED}"
            )
    if config.max_train_tokens is not None:
        if config.max_train_tokens < 1:
            raise ValueError(
                f"task.max_train_tokens must be at least 1 or None, got {config.max_train_tokens}"
            )
        order = np.random.default_rng(0).permutation(len(splits.train.lengths))
        shuffled = splits.train.select(order)
        splits = dataclasses.replace(splits, train=shuffled.split(config.max_train_tokens)[0])
    return splits


def _load(config: SourceConfig) -> Splits:
    installed = config.source in INSTALLED
    if not installed and prepared.is_prepared(config.source):
        return _load_prepared(config)
    if not config.eval_source and not 0 < config.eval_fraction < 1:
        raise ValueError(f"task.eval_fraction must lie between 0 and 1, got {config.eval_fraction}")
    is_tokens = not installed and _holds_tokens("source", config.source, config.pattern)
    if config.eval_source and _holds_tokens("eval_source", config.eval_source, config.pattern) != is_tokens:
        raise ValueError(
            f"task.source={config.source!r} and task.eval_source={config.eval_source!r} must be of one "
            "kind, both bytes or both token arrays"
        )
    if is_tokens:
        _check_no_plant(config)
        return _load_tokens(config)
    return _load_bytes(config)


def _check_no_plant(config: SourceConfig) -> None:
    if config.plant.distances:
        raise ValueError(
            f"task.plant.distances={config.plant.distances}: facts are planted into bytes, but task.source="
            f"{config.source!r} holds tokens; use a source of bytes"
        )


def _load_prepared(config: SourceConfig) -> Splits:
    _check_no_plant(config)
    for field in ("vocab_size", "separator_id", "bytes_per_token"):
        if getattr(config, field) is not None:
            raise ValueError(
                f"task.{field}={getattr(config, field)} is set, but the prepared corpus task.source="
                f"{config.source!r} has its own; leave the field unset"
            )
    if config.eval_source:
        raise ValueError(
            f"task.eval_source={config.eval_source!r} does not go with the prepared corpus task.source="
            f"{config.source!r}, which has its own validation side"
        )
    corpus = prepared.load(config.source)
    return Splits(
        corpus.train,
        corpus.validation,
        corpus.vocab_size,
        corpus.separator_id,
        manifest=None,
        prepared=corpus,
    )


def _holds_tokens(field: str, source: str, pattern: str) -> bool:
    """Whether the files of a path are token arrays, by their suffixes."""
    _, paths = find_files(f"task.{field}", source, pattern)
    arrays = [p for p in paths if p.endswith(token_arrays.SUFFIXES)]
    if arrays and len(arrays) < len(paths):
        other = next(p for p in paths if p not in arrays)
        raise ValueError(
            f"task.{field}={source!r} mixes token arrays ({arrays[0]}) with other files ({other}); choose "
            'one kind with task.pattern, as in "*.bin"'
        )
    return bool(arrays)


def _load_bytes(config: SourceConfig) -> Splits:
    """Files of bytes: each is a document, and lies on one side unless it is the only one."""
    root, files, kept, rule = _byte_files(config)
    train = {path: data for path, data in files.items() if path not in kept}
    validation = {path: data for path, data in files.items() if path in kept}
    if config.eval_source:
        base, paths = find_files("task.eval_source", config.eval_source, config.pattern)
        train = {path: data for path, data in files.items() if root / path not in {base / p for p in paths}}
        validation = {path: (base / path).read_bytes() for path in paths}
        rule = {"split": "task.eval_source", "eval_source": str(base)}
    sides = {"train": train, "validation": validation}
    if config.plant.distances:
        rule = {**rule, "plant": dataclasses.asdict(config.plant)}
    learned, evaluated = (
        _corpus(list(group.values()), config.plant, side) for side, group in enumerate(sides.values())
    )
    if not validation:
        sides = {"both": train}
        learned, evaluated = learned.split(learned.targets - int(learned.targets * config.eval_fraction))
    entries = [
        FileEntry(path, len(data), hashlib.sha256(data).hexdigest(), side)
        for side, group in sides.items()
        for path, data in group.items()
    ]
    manifest = Manifest(str(root), rule, tuple(entries))
    manifest.write(config.cache_dir)
    return Splits(learned, evaluated, ByteTokenizer.vocab_size, ByteTokenizer.separator_id, manifest)


def _corpus(documents: list[bytes], config: PlantConfig, side: int) -> Corpus:
    if not config.distances or not documents:
        return Corpus.from_documents(documents)
    planted = plant(documents, config, side)
    return Corpus.from_documents([d.text for d in planted], [d.marks for d in planted])


def _byte_files(config: SourceConfig) -> tuple[epath.Path, dict[str, bytes], set[str], dict[str, Any]]:
    """(root, {path: bytes}, held-out paths, rule for the manifest) of the source's own split."""
    if config.source in INSTALLED:
        root, files, kept, rule = INSTALLED[config.source](config.pattern)
        return epath.Path(root), files, kept, rule
    base, paths = find_files("task.source", config.source, config.pattern)
    files = {path: (base / path).read_bytes() for path in paths}
    if len(paths) == 1:
        return base, files, set(), {"split": "tail of the file", "eval_fraction": config.eval_fraction}
    rule = {"split": "by sha256 of the path", "eval_fraction": config.eval_fraction}
    return base, files, held_out(paths, config.eval_fraction), rule


def held_out(paths: Sequence[str], fraction: float) -> set[str]:
    """About ``fraction`` of ``paths``, by their sha256; at least one on either side, none of a single one."""
    place = {p: int(hashlib.sha256(p.encode()).hexdigest()[:16], 16) / 2**64 for p in paths}
    count = min(max(sum(v < fraction for v in place.values()), 1), len(paths) - 1)
    return set(sorted(paths, key=lambda p: place[p])[:count])


def _load_tokens(config: SourceConfig) -> Splits:
    if config.vocab_size is None:
        raise ValueError(
            f"task.source={config.source!r} holds token arrays: set task.vocab_size to their number of ids"
        )

    def read(field: str, source: str) -> Corpus:
        arrays = token_arrays.read_arrays(
            field, source, config.pattern, config.token_dtype, config.vocab_size or 0
        )
        return Corpus.from_arrays(arrays, config.separator_id)

    corpus = read("source", config.source)
    if config.eval_source:
        train = corpus
        validation = read("eval_source", config.eval_source)
    else:
        train, validation = corpus.split(corpus.targets - int(corpus.targets * config.eval_fraction))
    return Splits(train, validation, config.vocab_size, config.separator_id, None)

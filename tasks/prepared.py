"""A corpus that ``python -m tools.prepare`` wrote: shards of token ids, a manifest, a tokenizer.

    manifest.json                  what the shards are and what they were made of
    tokenizer.json                 absent for bytes
    SIDE-SOURCE-NNNNN.bin          raw ids: a separator before every document and after the last
    SIDE-SOURCE-NNNNN.starts.npy   int64 [documents]: index of the separator before each

Side is "train" or "validation". Sources may have weights: their shares of the training targets. An epoch of
the mixture is the smallest in which every source appears at least once in whole: source i with n_i targets
and weight w_i is repeated e_i = (w_i / n_i) / min_j (w_j / n_j) times, a fraction of a repeat being documents
drawn once and for all. Without weights every e_i is 1. A repeat costs 16 bytes of memory a document.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from tasks.corpus import Corpus

FORMAT = "longspan corpus 1"
MANIFEST, PROGRESS, TOKENIZER = "manifest.json", "progress.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard, as the manifest has it.

    Attributes:
        name: of its files, without suffixes.
        tokens: ids in it, separators included; one more than its targets.
        bytes: of text that its documents had.
        sha256, starts_sha256: of its two files.
    """

    name: str
    side: str
    source: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    starts_sha256: str


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared corpus opened for training.

    Attributes:
        tokenizer: path of its tokenizer.json; None for bytes.
        bytes_per_token: of the training side, separators counted as tokens.
        byte_exact: whether the byte lengths of a document's tokens add up to the document's, in all of them.
        digest: sha256 of all shards' hashes.
    """

    train: Corpus
    validation: Corpus
    vocab_size: int
    separator_id: int
    tokenizer: epath.Path | None
    bytes_per_token: float
    byte_exact: bool
    digest: str


def is_prepared(source: str) -> bool:
    """Whether ``source`` is a directory of `tools.prepare`, finished or not."""
    directory = epath.Path(source).expanduser()
    return any(_read(directory / name) is not None for name in (MANIFEST, PROGRESS))


def load(source: str) -> Prepared:
    """Open a prepared directory; local shards are memory-mapped, remote ones read.

    Raises:
        ValueError: its preparation was not finished, or a shard has another size than the manifest says.
    """
    directory = epath.Path(source).expanduser()
    manifest = _read(directory / MANIFEST)
    if manifest is None:
        raise ValueError(
            f"task.source={source!r}: its preparation was not finished (there is a {PROGRESS}, but no "
            f"{MANIFEST}); run the same python -m tools.prepare again, it goes on where it stopped"
        )
    dtype, tokenizer = np.dtype(manifest["dtype"]), manifest["tokenizer"]
    shards = [Shard(**entry) for entry in manifest["shards"]]
    train, validation = ([s for s in shards if s.side == side] for side in ("train", "validation"))
    weights = {s["name"]: s["weight"] for s in manifest["sources"] if s["weight"] is not None}
    return Prepared(
        train=_mix(_corpus(directory, train, dtype), train, weights),
        validation=_corpus(directory, validation, dtype),
        vocab_size=tokenizer["vocab_size"],
        separator_id=tokenizer["separator_id"],
        tokenizer=directory / TOKENIZER if tokenizer["sha256"] else None,
        bytes_per_token=manifest["bytes_per_token"],
        byte_exact=manifest["byte_exact"],
        digest=manifest["digest"],
    )


def epochs(targets: Sequence[int], weights: Sequence[float]) -> Float[np.ndarray, " n"]:
    """e_i: how often an epoch of the mixture repeats each source, given its targets and weight."""
    density = np.asarray(weights, np.float64) / np.asarray(targets, np.float64)
    return density / density.min()


def check_size(path: epath.Path, expected: int) -> None:
    """ValueError unless the file ``path`` has ``expected`` bytes."""
    found = path.stat().length if path.exists() else "no"
    if found != expected:
        raise ValueError(
            f"{path} has {found} bytes, but {MANIFEST} says {expected}: it is damaged or half copied. "
            "Copy it the corpus again, or delete it and prepare it again"
        )


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The JSON of ``path`` if it is one of ours."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def _corpus(directory: epath.Path, shards: Sequence[Shard], dtype: np.dtype) -> Corpus:
    arrays, starts, lengths = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    offset = 0
    for shard in shards:
        path = directory / f"{shard.name}.bin"
        check_size(path, shard.tokens * dtype.itemsize)
        local = "://" not in str(path)
        arrays.append(np.memmap(path, dtype, mode="r") if local else np.frombuffer(path.read_bytes(), dtype))
        with (directory / f"{shard.name}.starts.npy").open("rb") as file:
            begin = np.load(file, allow_pickle=False)
        if begin.shape != (shard.documents,):
            raise ValueError(
                f"{path}: {MANIFEST} says {shard.documents} documents, but starts.npy has {begin.shape}"
            )
        starts.append(begin + offset)
        lengths.append(np.diff(begin, append=shard.tokens - 1))
        offset += shard.tokens
    return Corpus(tuple(arrays), np.concatenate(starts), np.concatenate(lengths))


def _mix(corpus: Corpus, shards: Sequence[Shard], weights: Mapping[str, float]) -> Corpus:
    """``corpus`` with the documents of each source repeated as its weight asks for."""
    if not weights:
        return corpus
    source_of = np.repeat([s.source for s in shards], [s.documents for s in shards])
    documents = {name: np.flatnonzero(source_of == name) for name in weights}
    documents = {name: numbers for name, numbers in documents.items() if len(numbers)}
    targets = [int(corpus.lengths[numbers].sum()) for numbers in documents.values()]
    repeats = epochs(targets, [weights[name] for name in documents])
    chosen: list[Int[np.ndarray, " m"]] = []
    for numbers, count, total in zip(documents.values(), repeats, targets):
        whole, part = divmod(float(count), 1)
        order = np.random.default_rng(0).permutation(numbers)
        chosen += [numbers] * int(whole) + [order[np.cumsum(corpus.lengths[order]) <= part * total]]
    return corpus.select(np.concatenate(chosen))

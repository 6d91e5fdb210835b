"""A published checkpoint opened: its config, where its tensors are, its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from models import published
from models.config import LMConfig
from runtime.tensor_files import TensorFileError, TensorFiles, rank_files, unpickled
from tasks import bpe

CONFIG = "config.json"
TOKENIZER_FILES = (bpe.FILE, *bpe.TOLD, *bpe.OLDER)
"""What comes along where it is there."""
ROWS = 4096  # of two tensors compared at once


class ConvertError(ValueError):
    """A checkpoint cannot be converted; the message says why, and what would work."""


@dataclasses.dataclass(frozen=True)
class PublishedFiles:
    """A published checkpoint, of which headers have been read and no tensor.

    Attributes:
        raw: its config.json.
        format: of `models.published.FORMATS`.
        config: what the model is here.
        tensors: its tensors.
        sources: where in them each parameter is.
    """

    directory: Path
    raw: dict[str, Any]
    format: str
    config: LMConfig
    tensors: TensorFiles
    sources: dict[published.Path, published.Source]

    @classmethod
    def open(cls, path: str | Path, vocab_multiple: int | None = None) -> PublishedFiles:
        """A directory, or a file of tensors with config.json beside it.

        Args:
            vocab_multiple: the model's, in place of what the format has; rows that are added are zeros.

        Raises:
            ConvertError: there is no config.json, the architecture or a field of it is not supported, or
                tensors are missing, unexpected or of another shape (all are listed).
            TensorFileError: the tensors cannot be read.
        """
        path = Path(path)
        if not path.exists():
            raise ConvertError(f"{path} does not exist; give the directory of a published checkpoint")
        directory = path if path.is_dir() else path.parent
        raw, tensors = _config(directory), TensorFiles.open(path)
        shapes = {name: entry.shape for name, entry in tensors.entries.items()}
        try:
            format = published.detect(raw, shapes)
            config = published.config_from(raw, shapes)
            config.vocab_multiple = vocab_multiple or config.vocab_multiple
            config.validate()
        except ValueError as error:
            raise ConvertError(f"{directory / CONFIG}: {error}") from error
        try:
            sources = published.parameter_sources(config, format, shapes)
        except ValueError as error:
            raise ConvertError(f"{tensors.path}: {error}") from error
        opened = cls(directory, raw, format, config, tensors, sources)
        opened._check_tied()
        opened._check_dtypes()
        return opened

    def dtype(self, path: published.Path) -> np.dtype:
        """In which a parameter is in the file; of its first tensor, if they differ."""
        return self.tensors.entries[self.sources[path].names[0]].dtype

    def _check_tied(self) -> None:
        """Raises ConvertError if a head that is tied to the embedding is there and differs from it."""
        tied = published.tied_head(self.config, self.format, self.tensors.entries)
        if tied is None:
            return
        entries = [self.tensors.entries[name] for name in tied]
        equal = entries[0] == entries[1]
        count = entries[0].shape[0] if equal else 0
        for first in range(0, count, ROWS):
            rows = (slice(first, min(first + ROWS, count)),)
            head, embedding = (self.tensors.read(name, rows) for name in tied)
            equal = equal and head.tobytes() == embedding.tobytes()
        if not equal:
            raise ConvertError(
                f"{self.tensors.path}: {tied[0]} differs from {tied[1]}, to which it is tied by the config; "
                "one of the two is wrong"
            )

    def _check_dtypes(self) -> None:
        names = {name for source in self.sources.values() for name in source.names}
        for name in sorted(names):
            dtype = self.tensors.entries[name].dtype
            if dtype.kind in "iub":  # bfloat16 is of kind V
                raise ConvertError(
                    f"{self.tensors.path}: {name} is of dtype {dtype}; expected floating point (quantised "
                    "checkpoints are not supported; convert the original one)"
                )


def copy_tokenizer(source: Path, out: Any, vocab_size: int) -> bool:
    """Copies the files of a tokenizer into a run; False if there is no tokenizer.json among them.

    Args:
        source: a directory, or a tokenizer.json (what lies beside it comes along).
        out: directory of the run.

    Raises:
        ConvertError: the tokenizer cannot be used, or has more ids than the model.
    """
    directory = source if source.is_dir() else source.parent
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            (out / name).write_bytes((directory / name).read_bytes())
    if not (out / bpe.FILE).exists():
        return False
    try:
        found = bpe.BPETokenizer(out / bpe.FILE)
    except ValueError as error:
        raise ConvertError(f"{error} (--tokenizer=none leaves it out)") from error
    if found.vocab_size > vocab_size:
        raise ConvertError(
            f"{directory / bpe.FILE} has {found.vocab_size} ids, but the model only {vocab_size}: it belongs "
            "to another checkpoint; give --tokenizer=DIR, or --tokenizer=none"
        )
    return True


def _config(directory: Path) -> dict[str, Any]:
    """The config.json; of Megatron-LM, that or the arguments in the file of the first rank."""
    path = directory / CONFIG
    ranks = rank_files(directory)
    if ranks and not path.exists():
        loaded = unpickled(ranks[0])
        arguments = loaded.get("args") if isinstance(loaded, dict) else None
        if arguments is None:
            raise ConvertError(f"{ranks[0]} has no arguments (args), and {directory} no {CONFIG}")
        plain = (str, int, float, bool, type(None))
        return {name: value for name, value in vars(arguments).items() if isinstance(value, plain)}
    if not path.exists():
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
        raise ConvertError(f"{directory} has no {CONFIG}, which says what the tensors are (found: {there})")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConvertError(f"{path} should be a JSON object of fields, found {type(raw).__name__}")
    return raw


__all__ = ["ConvertError", "PublishedFiles", "TensorFileError", "copy_tokenizer"]

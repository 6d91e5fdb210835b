"""Tokenizers of the ``tokenizers`` library: byte-level BPE trained here, or one that was published."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int
from tokenizers.decoders import DecodeStream

from tasks.sources import SourceConfig
from tasks.tokenizer import ByteTokenizer, Tokenizer

FILE = "tokenizer.json"  # beside the shards of a prepared corpus, and in every run on one
SEPARATOR = "<|endoftext|>"
KNOWN_SEPARATORS = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>")


class BPETokenizer:
    """A ``tokenizer.json``; a `tasks.tokenizer.Tokenizer`.

    Raises:
        ValueError: the file is not a tokenizer, or has no token that separates documents.
    """

    def __init__(self, path: epath.PathLike, separator: str | None = None):
        text = epath.Path(path).read_text()
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{os.fspath(path)} is not a tokenizer.json: {error}") from error
        names = (separator,) if separator else KNOWN_SEPARATORS
        ids = {name: self._inner.token_to_id(name) for name in names}
        present = [number for number in ids.values() if number is not None]
        if not present:
            raise ValueError(
                f"{os.fspath(path)} has no token that separates documents; looked for {', '.join(ids)}"
            )
        self.separator_id: int = present[0]
        self.vocab_size: int = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, separator: bool = False) -> Int[np.ndarray, " L"]:
        """Ids int32 [L]; with ``separator`` a document start stands before them."""
        ids = self._inner.encode(text, add_special_tokens=False).ids
        return np.array([self.separator_id, *ids] if separator else ids, np.int32)

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of ``ids``; separators are dropped."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self) -> Callable[[Iterable[Any]], str]:
        """A function that is fed ids as they come and gives the text they complete."""
        decoder = DecodeStream(skip_special_tokens=True)
        return lambda ids: "".join(decoder.step(self._inner, int(i)) or "" for i in ids)


def of_run(workdir: epath.PathLike, config: SourceConfig) -> Tokenizer | None:
    """The tokenizer of a run: the one it keeps, bytes for a byte source, or None."""
    path = epath.Path(workdir) / FILE
    if path.exists():
        return BPETokenizer(path)
    # A source of token arrays must say how many ids it has; a source of bytes need not.
    return ByteTokenizer() if config.vocab_size is None else None

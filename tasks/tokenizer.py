"""Text to ids and back: the contract, and the byte-level tokenizer."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int


@runtime_checkable
class Tokenizer(Protocol):
    """What generation and probes need. ``separator_id`` opens and closes documents."""

    separator_id: int
    vocab_size: int

    def encode(self, text: str, *, separator: bool = False) -> Int[np.ndarray, " L"]:
        """Ids int32 [L]; with ``separator`` a document start stands before them."""

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of ``ids``; separators are dropped."""

    def stream(self) -> Callable[[Iterable[Any]], str]:
        """A function that is fed ids as they come and gives the text they complete."""


class ByteTokenizer:
    """Ids 0..255 are bytes; id 256 opens and closes a document (BOS, EOS and separator in one)."""

    separator_id = 256
    vocab_size = 257

    def encode(self, text: str | bytes, *, separator: bool = False) -> Int[np.ndarray, " L"]:
        """Ids int32 [L] of the (UTF-8) bytes; with ``separator`` a document start stands before them."""
        raw = text.encode("utf-8") if isinstance(text, str) else text
        ids = np.frombuffer(raw, np.uint8).astype(np.int32)
        return np.concatenate([[np.int32(self.separator_id)], ids]) if separator else ids

    def decode_bytes(self, ids: Iterable[Any]) -> bytes:
        """The bytes among ``ids``; separators are dropped. ValueError for an id outside 0..256."""
        array = np.asarray(ids, np.int64)
        if array.size and (array.min() < 0 or array.max() > self.separator_id):
            raise ValueError(f"byte ids lie in 0..256, found {array.min()}..{array.max()}")
        return array[array < self.separator_id].astype(np.uint8).tobytes()

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of ``ids``; separators are dropped, bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> Callable[[Iterable[Any]], str]:
        """A function that is fed ids as they come and gives the text they complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda ids: decoder.decode(self.decode_bytes(ids))

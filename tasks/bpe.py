"""Tokenizers of the ``tokenizers`` library: byte-level BPE trained here, or one that was published."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int
from tokenizers.decoders import DecodeStream
from tokenizers.pre_tokenizers import ByteLevel

from tasks.sources import SourceConfig
from tasks.tokenizer import ByteTokenizer, Tokenizer

FILE = "tokenizer.json"  # beside the shards of a prepared corpus, and in every run on one
SETTINGS = "tokenizer_config.json"  # beside a published one; names the token that ends a document
TOLD = (SETTINGS, "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""What a published tokenizer says beside its ids: special tokens, how a chat is written."""
OLDER = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
"""The same ids as in tokenizer.json, as other programs read them."""
SEPARATOR = "<|endoftext|>"
KNOWN_SEPARATORS = (SEPARATOR, "</s>", "<|end_of_text|>", "<eos>")


class BPETokenizer:
    """A ``tokenizer.json``; a `tasks.tokenizer.Tokenizer`.

    Special tokens spelt out in a text are encoded as the text they are. A published tokenizer may open
    documents with another token than it ends them with: ``opening_id``, which ``encode`` puts first.
    ``opens`` tells whether its own rule puts a token before every text.

    Args:
        separator: the token that ends documents; None for that of `SETTINGS`, or of `KNOWN_SEPARATORS`.

    Raises:
        ValueError: the file is not a tokenizer, or has no token that separates documents.
    """

    def __init__(self, path: epath.PathLike, separator: str | None = None):
        text, end = epath.Path(path).read_text(), separator or _end_of_document(epath.Path(path).parent)
        try:
            self._inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{os.fspath(path)} is not a tokenizer.json: {error}") from error
        names = (end,) if end else KNOWN_SEPARATORS
        ids = {name: self._inner.token_to_id(name) for name in names}
        present = [number for number in ids.values() if number is not None]
        if not present:
            raise ValueError(
                f"{os.fspath(path)} has no token that separates documents; looked for {', '.join(ids)}"
            )
        self._inner.encode_special_tokens = True
        self.separator_id: int = present[0]
        opening = self._inner.encode("").ids
        self.opens: bool = len(opening) == 1
        self.opening_id: int = opening[0] if self.opens else self.separator_id
        self.vocab_size: int = max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, separator: bool = False) -> Int[np.ndarray, " L"]:
        """Ids int32 [L]; with ``separator`` a document start stands before them."""
        ids = self._inner.encode(text, add_special_tokens=False).ids
        return np.array([self.opening_id, *ids] if separator else ids, np.int32)

    def encode_batch(self, texts: Sequence[str], dtype: str = "int32") -> list[np.ndarray]:
        """Ids [L] of each text, in one call of the library."""
        encoded = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype) for e in encoded]

    def byte_lengths(self) -> Int[np.ndarray, " V"] | None:
        """Bytes of text that each token stands for, 0 for special ones; None unless tokens are bytes."""
        lengths = np.zeros(self.vocab_size, np.int32)
        added = self._inner.get_added_tokens_decoder()
        alphabet = set(ByteLevel.alphabet())  # one character a byte
        for token, number in self._inner.get_vocab(with_added_tokens=False).items():
            if number not in added and not alphabet.issuperset(token):
                return None
            lengths[number] = len(token)
        for number, extra in added.items():
            lengths[number] = 0 if extra.special else len(extra.content.encode())
        return lengths

    @functools.cached_property
    def splits_at_lines(self) -> bool:
        """Whether texts cut after a line, between two characters that are no white space, have the ids of the
        whole: what byte-level tokenizers do and those that mark the start of a text do not."""
        pairs = (("word\n", "word"), ("x = f();\n", "#"), ("1\n", "2"))
        whole = self.encode_batch([a + b for a, b in pairs])
        parts = [np.concatenate(self.encode_batch(pair)) for pair in pairs]
        return all(np.array_equal(a, b) for a, b in zip(whole, parts))

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of ``ids``; separators are dropped."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self) -> Callable[[Iterable[Any]], str]:
        """A function that is fed ids as they come and gives the text they complete."""
        decoder = DecodeStream(skip_special_tokens=True)
        return lambda ids: "".join(decoder.step(self._inner, int(i)) or "" for i in ids)


def inherit(source: epath.Path, target: epath.Path) -> None:
    """Copy what belongs to the tokenizer of a run to a run that starts from it; what is there stays.

    ``target`` has its tokenizer.json already; where it adds tokens, files that repeat the ids stay behind.
    """
    ids, ours = source / FILE, target / FILE
    if not ids.exists() or not ours.exists():
        return
    for name in (*TOLD, *(OLDER if ids.read_bytes() == ours.read_bytes() else ())):
        if (source / name).exists() and not (target / name).exists():
            (source / name).copy(target / name)


def _end_of_document(directory: epath.Path) -> str | None:
    """The ``eos_token`` of a published tokenizer's settings, if it has any."""
    path = directory / SETTINGS
    try:
        end = json.loads(path.read_text()).get("eos_token") if path.exists() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} should be a JSON object of a tokenizer's settings: {error}") from error
    return end["content"] if isinstance(end, dict) else end


def train(texts: Iterable[str], vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE learned from ``texts``, with `SEPARATOR` as id 0.

    It has fewer ids than ``vocab_size`` where the texts do not repeat enough.

    Raises:
        ValueError: ``vocab_size`` has no room for the bytes and the separator.
    """
    if vocab_size < 257:
        raise ValueError(
            f"a vocabulary of {vocab_size} has no room for 256 bytes and a separator: 257 at least"
        )
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner.to_str(pretty=True)


def of_run(workdir: epath.PathLike, config: SourceConfig) -> Tokenizer | None:
    """The tokenizer of a run: the one it keeps, bytes for a byte source, or None."""
    path = epath.Path(workdir) / FILE
    if path.exists():
        return BPETokenizer(path)
    # A source of token arrays must say how many ids it has; a source of bytes need not.
    return ByteTokenizer() if config.vocab_size is None else None

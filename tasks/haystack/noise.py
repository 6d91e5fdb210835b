"""Text to hide facts in: the line that passkeys were published with, sentences made by rule, a corpus."""

from __future__ import annotations

import re

import numpy as np

from tasks.corpus import Corpus
from tasks.tokenizer import Tokenizer

GRASS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SUBJECTS = (
    *(
        "the baker",
        "a sailor",
        "the old clerk",
        "my neighbour",
        "the gardener",
        "a young painter",
        "the judge",
    ),
    *("every student", "the night guard", "our teacher", "a tired farmer", "the violinist"),
)
VERBS = (
    *(
        "repaired",
        "described",
        "forgot",
        "carried",
        "sold",
        "admired",
        "borrowed",
        "measured",
        "hid",
        "found",
    ),
    *("cleaned", "drew"),
)
OBJECTS = (
    *("a wooden boat", "the long letter", "two copper pots", "a map of the coast", "the broken clock"),
    *("seven candles", "a heavy coat", "the last ticket", "an empty bottle", "some dry bread"),
    *("a blue lantern", "the garden wall"),
)
PLACES = (
    *("near the station", "before the rain came", "on a quiet morning", "behind the mill", "without a word"),
    *("for the whole summer", "beside the river", "after the concert", "at the edge of the forest"),
    *("under the bridge", "with great care", "in the town hall"),
)


def grass(rng: np.random.Generator, characters: int) -> str:
    """The published noise line repeated, single spaces between."""
    return (f"{GRASS} " * (characters // (len(GRASS) + 1) + 1))[:characters]


def sentences(rng: np.random.Generator, characters: int) -> str:
    """Sentences of words drawn at random: 20,736 different ones."""
    text, size = [], 0
    while size < characters:
        parts = (words[i] for words, i in zip((SUBJECTS, VERBS, OBJECTS, PLACES), rng.integers(12, size=4)))
        sentence = " ".join(parts)
        text.append(f"{sentence[0].upper()}{sentence[1:]}.")
        size += len(text[-1]) + 1
    return " ".join(text)[:characters]


class CorpusText:
    """Text of a corpus from a random place on, documents run together, the first after the last."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self._corpus, self._tokenizer = corpus, tokenizer
        self._ends = np.cumsum(corpus.lengths)

    def __call__(self, rng: np.random.Generator, characters: int) -> str:
        start, pieces, size = int(rng.integers(self._corpus.targets)), list[str](), 0
        while size < characters:
            count = min(max(characters - size, 64), self._corpus.targets)
            pieces.append(self._text(start, count))
            start, size = start + count, size + len(pieces[-1])
        return "".join(pieces)[:characters]

    def _text(self, start: int, count: int) -> str:
        pair = (start + np.arange(count)) % self._corpus.targets
        document = np.searchsorted(self._ends, pair, side="right")
        index = self._corpus.starts[document] + pair - (self._ends - self._corpus.lengths)[document]
        return self._tokenizer.decode(self._corpus.take(index))


def pieces(text: str) -> list[str]:
    """``text`` cut after sentences and lines; white space around the pieces is dropped, and the last, which
    may be cut off."""
    found = [piece.strip() for piece in re.split(r"(?<=[.!?])\s+|\n", text)]
    return [piece for piece in found[:-1] if piece]

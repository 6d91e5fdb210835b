"""A corpus: documents as spans of one long token array, which may lie in several memory-mapped files.

A document of n (token, target) pairs that starts at index i of the array has the tokens ``array[i : i + n]``
and the targets ``array[i + 1 : i + n + 1]``. In a byte corpus the separator stands before every document and
after the last, so that bytes b1..bn give tokens [256, b1..bn] and targets [b1..bn, 256].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from tasks.tokenizer import ByteTokenizer


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents over the concatenation of ``shards``.

    Attributes:
        shards: 1-D integer arrays, in memory or memory-mapped; no document crosses from one to the next.
        starts: index of each document's first token in the concatenation, int64 [n].
        lengths: number of (token, target) pairs of each document, at least 1, int64 [n].
        marks: of every token of ``shards``, uint8; None where nothing is marked (see `tasks.plant`).
    """

    shards: tuple[np.ndarray, ...]
    starts: Int[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    marks: tuple[np.ndarray, ...] | None = None

    @classmethod
    def from_documents(cls, documents: Sequence[bytes], marks: Sequence[np.ndarray] | None = None) -> Corpus:
        """Byte documents, copied into one uint16 array (two bytes of memory per byte); empty ones dropped.

        Args:
            marks: of the bytes of each document, uint8; the separators have 0.
        """
        if marks is not None:
            marks = [m for m, d in zip(marks, documents, strict=True) if d]
        documents = [d for d in documents if d]
        lengths = np.array([len(d) + 1 for d in documents], np.int64)
        starts = np.cumsum(lengths) - lengths
        array = np.full(int(lengths.sum()) + 1, ByteTokenizer.separator_id, np.uint16)
        for start, document in zip(starts, documents):
            array[start + 1 : start + 1 + len(document)] = np.frombuffer(document, np.uint8)
        if marks is None:
            return cls((array,), starts, lengths)
        marked = np.zeros(len(array), np.uint8)
        for start, document_marks in zip(starts, marks):
            marked[start + 1 : start + 1 + len(document_marks)] = document_marks
        return cls((array,), starts, lengths, (marked,))

    @classmethod
    def from_arrays(cls, shards: Sequence[np.ndarray], separator_id: int | None = None) -> Corpus:
        """Token arrays. A ``separator_id`` opens a new document wherever it stands (one pass over the data);
        without it every array is one document."""
        starts, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        offset = 0
        for shard in shards:
            pairs = len(shard) - 1
            if pairs > 0:
                inner = (
                    np.zeros(0, np.int64) if separator_id is None else _find(shard[1:pairs], separator_id) + 1
                )
                begin = np.concatenate([[0], inner])
                starts.append(begin + offset)
                lengths.append(np.diff(begin, append=pairs))
            offset += len(shard)
        return cls(tuple(shards), np.concatenate(starts), np.concatenate(lengths))

    @property
    def targets(self) -> int:
        """Number of (token, target) pairs."""
        return int(self.lengths.sum())

    def take(self, index: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Token ids, int32, at ``index`` of the concatenated shards."""
        return _take(self.shards, index)

    def pairs_at(self, index: Int[np.ndarray, "*shape"]) -> dict[str, Int[np.ndarray, "*shape"]]:
        """The fields ``tokens``, ``targets`` and, if there are any, ``marks`` (of the targets) of a batch."""
        fields = {"tokens": self.take(index), "targets": self.take(index + 1)}
        return fields if self.marks is None else {**fields, "marks": _take(self.marks, index + 1)}

    def pairs(self) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
        """Tokens, targets and positions in the document of all pairs, in corpus order."""
        positions = np.arange(self.targets) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        index = np.repeat(self.starts, self.lengths) + positions
        return self.take(index), self.take(index + 1), positions

    def select(self, documents: Int[np.ndarray, " m"]) -> Corpus:
        """The documents with these numbers, over the same arrays."""
        return dataclasses.replace(self, starts=self.starts[documents], lengths=self.lengths[documents])

    def split(self, at: int) -> tuple[Corpus, Corpus]:
        """The first ``at`` pairs and the rest; a document may be cut in two."""
        end = np.cumsum(self.lengths)
        before = np.clip(at - (end - self.lengths), 0, self.lengths)
        after = self.lengths - before
        head = dataclasses.replace(self, starts=self.starts[before > 0], lengths=before[before > 0])
        rest = dataclasses.replace(self, starts=(self.starts + before)[after > 0], lengths=after[after > 0])
        return head, rest


def _take(arrays: Sequence[np.ndarray], index: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """int32 at ``index`` of the concatenation of ``arrays``."""
    if len(arrays) == 1:
        return arrays[0][index].astype(np.int32)
    edges = np.cumsum([len(a) for a in arrays])
    which = np.searchsorted(edges, index, side="right")
    out = np.empty(index.shape, np.int32)
    for number in np.unique(which):
        here = which == number
        out[here] = arrays[number][index[here] - (edges[number] - len(arrays[number]))]
    return out


def _find(array: np.ndarray, value: int, block: int = 1 << 24) -> Int[np.ndarray, " k"]:
    """Indices where ``array == value``, block by block: the array may be larger than memory."""
    found = [np.flatnonzero(array[i : i + block] == value) + i for i in range(0, len(array), block)]
    return np.concatenate([np.zeros(0, np.int64), *found])

"""Documents laid out into rows: batch s is a pure function of (corpus, layout, seed, s).

Every epoch shuffles the documents and lays them one after another on a stream of P (token, target) pairs.

* Without carried state the stream is cut into windows of L, which are shuffled too; rows g = s B + r of
  consecutive batches walk through the windows of epoch 0, 1, 2, ... and nothing is dropped or padded but the
  end of each epoch's last window.
* With carried state row r owns the r-th of B equal parts of the stream and crawls through it, L pairs a
  step: row r of batch s + 1 continues row r of batch s. Rows are padded at the end of an epoch.

No iterator state, and no dependence on which rows are asked for.
"""

from __future__ import annotations

import dataclasses
import math

import grain
import numpy as np
from jaxtyping import Int

from tasks.corpus import Corpus

PACKINGS = ("docs", "stream", "buckets")
_MAX_ID = 2**31 - 1
# float32 holds integers exactly up to here; rotary embeddings would lose positions beyond. Rows that carry
# state may go further: there is no other way to read on, and recurrent mixers do not look at positions.
_EXACT = 2**24
ENDLESS = 2**62  # length of a training dataset; below sys.maxsize so that slices of it stay representable


@dataclasses.dataclass(frozen=True)
class Layout:
    """How rows are cut.

    Attributes:
        batch_size, seq_len: B and L.
        packing: "docs": a segment per document; positions count from its start, also in a window that begins
            inside it. "stream": documents run on into each other; a row (with carried state: a row's part of
            the epoch) is one segment. "buckets" is laid out by `tasks.buckets`.
        carry_state: rows continue from batch to batch.
    """

    batch_size: int
    seq_len: int
    packing: str = "docs"
    carry_state: bool = False

    def __post_init__(self):
        for name in ("batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} must be at least 1, got {getattr(self, name)}")
        if self.packing not in PACKINGS:
            raise ValueError(f"task.packing must be one of {PACKINGS}, got {self.packing!r}")


def row_range(rows: slice | None, batch_size: int) -> tuple[int, int]:
    """Start and stop of ``rows`` (None for all); ValueError unless they are a non-empty part of a batch."""
    start, stop, stride = (rows or slice(None)).indices(batch_size)
    if rows is not None and (stride != 1 or not start < stop or (rows.stop or 0) > batch_size):
        raise ValueError(f"rows must be a non-empty slice within 0..{batch_size}, got {rows}")
    return start, stop


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """The stream of one epoch: where its documents lie, and the order of its windows."""

    edges: Int[np.ndarray, " n"]  # where each document begins on the stream
    shift: Int[np.ndarray, " n"]  # corpus index of pair p of document o is p + shift[o]
    windows: Int[np.ndarray, " w"]


class Packer:
    """Batches of ``corpus`` under ``layout``; endless and reshuffled per epoch, or one pass (``once``)."""

    def __init__(self, corpus: Corpus, layout: Layout, *, seed: int, once: bool = False):
        self.corpus, self.layout, self.seed, self.once = corpus, layout, seed, once
        self.pairs = corpus.targets
        self._check_positions()
        self._epochs: dict[int, _Epoch] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Batches that cover the corpus once (without carried state the last runs into the next epoch)."""
        rows, length = self.layout.batch_size, self.layout.seq_len
        if self.layout.carry_state:
            return math.ceil(math.ceil(self.pairs / rows) / length)
        return math.ceil(self._windows / rows)

    @property
    def length_shares(self) -> dict[int, float]:
        """Share of the steps by the length of their rows: all of them have one."""
        return {self.layout.seq_len: 1.0}

    def dataset(self, rows: slice | None = None, limit: int | None = None) -> grain.MapDataset:
        """``dataset[s]``: rows ``rows`` of batch s. With ``once``, at most ``limit`` batches."""
        start, stop = row_range(rows, self.layout.batch_size)
        length = min(self.steps_per_epoch, limit or self.steps_per_epoch) if self.once else ENDLESS
        return grain.MapDataset.range(length).map(lambda step: self.batch(step, start, stop))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Rows ``[start, stop)`` of batch ``step``, each array [rows, L] (`tasks.types.token_batch_spec`)."""
        row = np.arange(start, self.layout.batch_size if stop is None else stop, dtype=np.int64)
        if self.layout.carry_state:
            epoch, inner = divmod(int(step), self.steps_per_epoch)
            part = row * self.pairs // self.layout.batch_size
            end = (row + 1) * self.pairs // self.layout.batch_size
            return self._rows(epoch, part, part + inner * self.layout.seq_len, end)
        index = int(step) * self.layout.batch_size + row
        if self.once:
            return self.windows(0, index)
        epochs = index // self._windows
        parts = [self.windows(int(e), index[epochs == e] - int(e) * self._windows) for e in np.unique(epochs)]
        return parts[0] if len(parts) == 1 else {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def windows(self, epoch: int, slot: Int[np.ndarray, " b"]) -> dict[str, np.ndarray]:
        """Rows [b, L] of the windows in these slots of an epoch's order; slots past the end are padding."""
        windows = self._epoch(epoch).windows
        window = np.where(slot < len(windows), windows[np.minimum(slot, len(windows) - 1)], len(windows))
        begin = window * self.layout.seq_len
        return self._rows(epoch, begin, begin, np.full_like(begin, self.pairs))

    @property
    def _windows(self) -> int:
        return math.ceil(self.pairs / self.layout.seq_len)

    def _check_positions(self) -> None:
        layout = self.layout
        if layout.packing == "docs":
            longest = int(self.corpus.lengths.max(initial=0))
        else:
            longest = self.pairs // layout.batch_size if layout.carry_state else layout.seq_len
        limit = _MAX_ID if layout.carry_state else _EXACT
        if longest > limit:
            raise ValueError(
                f"positions would run to {longest}, above {limit}: a document is too long. Split token "
                'arrays with task.separator_id, or set task.packing="stream" (with task.carry_state=False)'
            )

    def _rows(
        self,
        epoch: int,
        part: Int[np.ndarray, " b"],
        begin: Int[np.ndarray, " b"],
        end: Int[np.ndarray, " b"],
    ) -> dict[str, np.ndarray]:
        """Pairs ``[begin, begin + L)`` of an epoch's stream, padded from ``end`` on; ``part`` is where the
        row's stretch of the stream begins."""
        stream = self._epoch(epoch)
        pair = begin[:, None] + np.arange(self.layout.seq_len)
        real = pair < end[:, None]
        pair = np.minimum(pair, self.pairs - 1)
        document = np.searchsorted(stream.edges, pair, side="right") - 1
        index = pair + stream.shift[document]
        carry, count = self.layout.carry_state, len(stream.shift)
        if self.layout.packing == "stream":
            positions, document, count = pair - part[:, None], np.zeros_like(pair), 1
        else:
            positions = pair - stream.edges[document]
        # With carried state an id must be the same in the next batch, and another in the next epoch.
        segment = (epoch * count + document) % _MAX_ID if carry else document - document[:, :1]
        fields = self.corpus.pairs_at(index)
        fields |= {"segment_ids": segment + 1, "positions": positions}
        batch = {name: np.where(real, value, 0).astype(np.int32) for name, value in fields.items()}
        return {**batch, "weights": real.astype(np.float32)}

    def _epoch(self, number: int) -> _Epoch:
        """The stream of an epoch; the last few made are kept. Safe to call from several threads."""
        epoch = self._epochs.get(number)
        if epoch is None:
            rng = np.random.default_rng((self.seed, number))
            order = rng.permutation(len(self.corpus.lengths))
            edges = np.cumsum(self.corpus.lengths[order]) - self.corpus.lengths[order]
            windows = np.zeros(0, np.int64) if self.layout.carry_state else rng.permutation(self._windows)
            epoch = _Epoch(edges, self.corpus.starts[order] - edges, windows)
            for old in list(self._epochs)[:-3]:
                self._epochs.pop(old, None)
            self._epochs[number] = epoch
        return epoch

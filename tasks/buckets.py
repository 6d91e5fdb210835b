"""Length buckets with a curriculum: Dataset Decomposition (arXiv:2405.13226).

A document of n (token, target) pairs is cut into pieces whose lengths are the powers of two that n is the sum
of, longest first (and as many of the longest length L as fit). Pieces of one length make a bucket, and a
batch is rows of one bucket: rows that are n times shorter are n times more, so every batch has B L pairs.
Nothing attends across documents, and nothing is padded but the last batch of each bucket in an epoch.

What is left of a document, fewer pairs than the shortest length, is laid end to end with what is left of the
others and cut into rows of the shortest length, a segment per document. (The paper drops it.)

An epoch is divided into cycles, which hold equal parts of every bucket. Within a cycle the bucket of the next
batch is drawn with given odds among those that have batches left: odds that favour short rows use these up
first, so that the length grows in every cycle.
"""

from __future__ import annotations

import dataclasses
import math

import grain
import numpy as np
from jaxtyping import Int

from tasks.corpus import Corpus
from tasks.packing import ENDLESS, Layout, Packer, row_range

CURRICULA = ("shuffled", "uniform", "grow_linear", "grow_p2")


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """In which order the buckets come.

    Attributes:
        shortest: length of the shortest rows; a power of two.
        order: odds of the buckets. "uniform": equal. "grow_linear": n, n - 1, ..., 1 from the shortest to the
            longest. "grow_p2": 2^(n-1), ..., 2, 1. "shuffled": as many batches as each has, so that no length
            comes sooner than another. Or numbers, shortest first, as in "8:4:1".
        cycles: of an epoch.
    """

    shortest: int
    order: str = "grow_p2"
    cycles: int = 8

    def odds(self, lengths: int) -> list[float] | None:
        """Of that many buckets, shortest first; None for "shuffled".

        Raises:
            ValueError: ``order`` is no name and not one positive number a bucket.
        """
        named = {
            "shuffled": None,
            "uniform": [1.0] * lengths,
            "grow_linear": [float(n) for n in range(lengths, 0, -1)],
            "grow_p2": [2.0**n for n in range(lengths - 1, -1, -1)],
        }
        if self.order in named:
            return named[self.order]
        try:
            numbers = [float(n) for n in self.order.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) != lengths or not all(0 < n < math.inf for n in numbers):
            raise ValueError(
                f"task.curriculum={self.order!r} should be one of {CURRICULA}, or {lengths} positive odds "
                f"for the lengths from {self.shortest} on, as in {':'.join(map(str, range(lengths, 0, -1)))}"
            )
        return numbers


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """Bucket of every batch and its number there, and the order of the pieces of each bucket."""

    bucket: Int[np.ndarray, " S"]
    number: Int[np.ndarray, " S"]
    pieces: tuple[Int[np.ndarray, ...], ...]


class BucketPacker:
    """Endless batches of ``corpus``: ``layout.batch_size`` x ``layout.seq_len`` pairs, in rows of one length.

    Raises:
        ValueError: a length is no power of two, or the state is to be carried; names the field.
    """

    def __init__(self, corpus: Corpus, layout: Layout, curriculum: Curriculum, *, seed: int):
        _check(layout, curriculum)
        self.corpus, self.layout, self.curriculum, self.seed = corpus, layout, curriculum, seed
        longest, shortest = layout.seq_len, curriculum.shortest
        powers = [2**i for i in range(shortest.bit_length() - 1, longest.bit_length())]
        left = corpus.lengths % shortest
        rest = dataclasses.replace(
            corpus, starts=(corpus.starts + corpus.lengths - left)[left > 0], lengths=left[left > 0]
        )
        # Bucket 0 is what is left of the documents; it has the length of bucket 1.
        self.lengths = [shortest, *powers]
        self._starts = [np.zeros(0, np.int64), *(_pieces(corpus, length, longest) for length in powers)]
        self._rest = Packer(rest, Layout(layout.batch_size, shortest), seed=seed)
        rows = [math.ceil(rest.targets / shortest), *(len(starts) for starts in self._starts[1:])]
        self.batches = [
            math.ceil(n * length / (layout.batch_size * longest)) for n, length in zip(rows, self.lengths)
        ]
        self._odds = self._bucket_odds(curriculum.odds(len(powers)))
        self._epochs: dict[int, _Epoch] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every pair once."""
        return sum(self.batches)

    @property
    def length_shares(self) -> dict[int, float]:
        """Share of the steps that have rows of each length."""
        shares = dict.fromkeys(self.lengths, 0.0)
        for length, count in zip(self.lengths, self.batches):
            shares[length] += count / self.steps_per_epoch
        return {length: share for length, share in shares.items() if share}

    def dataset(self, rows: slice | None = None) -> grain.MapDataset:
        """``dataset[s]``: batch s, or the part of it that ``rows`` of ``layout.batch_size`` stand for."""
        start, stop = row_range(rows, self.layout.batch_size)
        return grain.MapDataset.range(ENDLESS).map(lambda step: self.batch(step, start, stop))

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Batch ``step``, arrays [B L / l, l] (`tasks.types.token_batch_spec`), or rows [start, stop) L / l
        of it."""
        number, inner = divmod(int(step), self.steps_per_epoch)
        epoch = self._epoch(number)
        bucket = int(epoch.bucket[inner])
        times = self.layout.seq_len // self.lengths[bucket]
        stop = self.layout.batch_size if stop is None else stop
        first = int(epoch.number[inner]) * self.layout.batch_size * times
        slots = first + np.arange(start * times, stop * times)
        if bucket == 0:
            return self._rest.windows(number, slots)
        pieces, length = epoch.pieces[bucket], self.lengths[bucket]
        real = np.broadcast_to((slots < len(pieces))[:, None], (len(slots), length))
        begin = self._starts[bucket][pieces[np.minimum(slots, len(pieces) - 1)]]
        index = begin[:, None] + np.arange(length)
        fields = self.corpus.pairs_at(index)
        fields |= {
            "segment_ids": np.ones_like(index),
            "positions": np.broadcast_to(np.arange(length), index.shape),
        }
        batch = {name: np.where(real, value, 0).astype(np.int32) for name, value in fields.items()}
        return {**batch, "weights": real.astype(np.float32)}

    def _bucket_odds(self, odds: list[float] | None) -> list[float]:
        """Odds of each bucket from those of each length; the two of the shortest length share its odds."""
        if odds is None:
            return [float(max(n, 1)) for n in self.batches]
        shortest = max(self.batches[0] + self.batches[1], 1)
        return [max(n, 1) / shortest * odds[0] for n in self.batches[:2]] + odds[1:]

    def _epoch(self, number: int) -> _Epoch:
        """The order of an epoch; the last few made are kept. Safe to call from several threads."""
        epoch = self._epochs.get(number)
        if epoch is None:
            rng = np.random.default_rng((self.seed, number, 1))
            pieces = tuple(rng.permutation(len(starts)) for starts in self._starts)
            cycle, time = zip(*(self._arrivals(rng, n, odds) for n, odds in zip(self.batches, self._odds)))
            order = np.lexsort((np.concatenate(time), np.concatenate(cycle)))
            bucket = np.repeat(np.arange(len(self.batches)), self.batches)[order]
            count = np.concatenate([np.arange(n) for n in self.batches])[order]
            epoch = _Epoch(bucket, count, pieces)
            for old in list(self._epochs)[:-3]:
                self._epochs.pop(old, None)
            self._epochs[number] = epoch
        return epoch

    def _arrivals(
        self, rng: np.random.Generator, batches: int, odds: float
    ) -> tuple[Int[np.ndarray, " n"], np.ndarray]:
        """Cycle of each batch of a bucket, and its time within the cycle.

        Drawing among the buckets that have something left, with fixed odds, is the order of independent
        Poisson processes whose rates are the odds.
        """
        cycle = ((np.arange(batches) + rng.random()) * self.curriculum.cycles / max(batches, 1)).astype(
            np.int64
        )
        time = np.cumsum(rng.exponential(1 / odds, batches))
        first = np.searchsorted(cycle, cycle)
        return cycle, time - np.where(first > 0, time[first - 1], 0.0)


def _pieces(corpus: Corpus, length: int, longest: int) -> Int[np.ndarray, " m"]:
    """Where the pieces of ``length`` start in the corpus."""
    if length == longest:
        count = corpus.lengths // length
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(corpus.starts, count) + within * length
    has = (corpus.lengths & length) > 0
    # All longer pieces of the document come first.
    return (corpus.starts + corpus.lengths - corpus.lengths % (2 * length))[has]


def _check(layout: Layout, curriculum: Curriculum) -> None:
    shortest, longest = curriculum.shortest, layout.seq_len
    for name, value in (("seq_len", longest), ("shortest_seq_len", shortest)):
        if value < 1 or value & (value - 1):
            below = 2 ** max(value.bit_length() - 1, 0)
            raise ValueError(
                f'task.{name}={value} should be a power of two with task.packing="buckets", such as {below}'
            )
    if shortest > longest:
        raise ValueError(f"task.shortest_seq_len={shortest} should be at most task.seq_len={longest}")
    if curriculum.cycles < 1:
        raise ValueError(f"task.curriculum_cycles={curriculum.cycles} should be at least 1")
    if layout.carry_state:
        raise ValueError(
            "task.carry_state=True needs rows that continue each other; those of task.packing='buckets' do "
            "not, use 'docs' or 'stream'"
        )

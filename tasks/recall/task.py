"""Recall as a task: generated rows, the loss of answers, accuracy by size and distance."""

from __future__ import annotations

import math
from collections.abc import Mapping

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tasks.packing import ENDLESS, row_range
from tasks.recall import draws
from tasks.recall.config import RecallTaskConfig, Size
from tasks.recall.schedule import Schedule
from tasks.recall.types import Rows
from tasks.types import Batch, Mean, weighted_sum

TRAINING, HELD_OUT = 0, 1  # streams of rows


class RecallTask:
    """Rows of a `tasks.recall.types.Generator`; a `tasks.types.Task`.

    A batch has the fields of `tasks.types.token_batch_spec` and ``distance`` int32 [B, L], above 0 where an
    answer is asked for; held-out batches have ``size`` int32 [B] too, the index in ``config.evaluated``.
    Rows of a batch have one length; shorter ones are more (``equal_tokens``).

    Attributes:
        eval_shape: (B, L) of the longest held-out batches.

    Raises:
        ValueError: a field that cannot work.
    """

    def __init__(self, config: RecallTaskConfig):
        config.validate()
        self.config, self.law = config, config.law
        self._train_lengths = [self._length(size) for size in config.train_sizes]
        self._eval_lengths = [self._length(size) for size in config.evaluated]
        if config.one_length:
            self._train_lengths = [max(self._train_lengths)] * len(self._train_lengths)
            self._eval_lengths = [max(self._eval_lengths)] * len(self._eval_lengths)
        self.eval_shape = (config.eval_batch_size or config.batch_size, max(self._eval_lengths))
        count, times = len(config.train_sizes), self._times(self._train_lengths)
        rows = config.train_rows * (count if len(config.train_rows) == 1 else 1)
        self._train_batch = [config.batch_size * t for t in times]
        batches = [max(n // b, 1) for n, b in zip(rows, self._train_batch)]
        self._rows_an_epoch = [n * b for n, b in zip(batches, self._train_batch)]
        self._schedule = Schedule(batches, config.starts, config.keep_started, config.seed)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.law.vocab_size

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(B, L) of every kind of batch, by a prefix that tells which; B counts rows of the longest."""
        config = self.config
        named = {f"train_sizes[{i}].": (config.batch_size, n) for i, n in enumerate(self._train_lengths)}
        return named | {
            f"eval_sizes[{i}].": (self.eval_shape[0], n) for i, n in enumerate(self._eval_lengths)
        }

    @property
    def length_shares(self) -> dict[int, float]:
        """Share of the training steps by the length of their rows, of all sizes mixed."""
        shares = dict.fromkeys(self._train_lengths, 0.0)
        for length, share in zip(self._train_lengths, self._schedule.shares):
            shares[length] += share
        return shares

    @property
    def tokens_per_step(self) -> int:
        """Positions of a training batch, padding included; the mean where sizes differ in it."""
        tokens = [rows * length for rows, length in zip(self._train_batch, self._train_lengths)]
        return round(sum(n * share for n, share in zip(tokens, self._schedule.shares)))

    def train(self, rows: slice | None = None) -> grain.MapDataset:
        """``dataset[s]`` is batch s, or its rows ``rows`` (of the longest size; of shorter ones more)."""
        start, stop = row_range(rows, self.config.batch_size)

        def batch(step: int) -> dict[str, np.ndarray]:
            drawn = self._schedule.at(int(step))
            size, many = self.config.train_sizes[drawn.size], self._train_batch[drawn.size]
            times = many // self.config.batch_size
            number = drawn.block * many + np.arange(start * times, stop * times)
            stream: tuple[int, ...] = (self.config.seed, TRAINING, drawn.size)
            if self.config.fresh:
                stream += drawn.era
            else:  # the same rows in the order of this epoch
                total = self._rows_an_epoch[drawn.size]
                number = np.random.default_rng((*stream, *drawn.era)).permutation(total)[number]
            return self._rows(size, self._train_lengths[drawn.size], stream, number, held_out=False)

        return grain.MapDataset.range(ENDLESS).map(batch)

    def eval_sets(self, rows: slice | None = None) -> dict[str, grain.MapDataset]:
        """``{"validation": dataset}``: ``eval_rows`` rows of each size, one size after the other; the same
        whatever the seed. What fills the last batch of a size weighs nothing."""
        rows_each = self.eval_shape[0]
        start, stop = row_range(rows, rows_each)
        enough = math.ceil(self.config.eval_rows / rows_each)
        times = [min(t, enough) for t in self._times(self._eval_lengths)]
        count = [math.ceil(self.config.eval_rows / (rows_each * t)) for t in times]
        index = np.repeat(np.arange(len(count)), count)
        block = np.concatenate([np.arange(n) for n in count])

        def batch(step: int) -> dict[str, np.ndarray]:
            i = int(index[step])
            many = rows_each * times[i]
            number = int(block[step]) * many + np.arange(start * times[i], stop * times[i])
            made = self.held_out(self.config.evaluated[i], number, self._eval_lengths[i])
            made["weights"] = made["weights"] * (number < self.config.eval_rows)[:, None]
            return {**made, "size": np.full(len(number), i, np.int32)}

        return {"validation": grain.MapDataset.range(len(index)).map(batch)}

    def held_out(self, size: Size, number: Int[np.ndarray, " n"], length: int = 0) -> Rows:
        """Held-out rows of any size the law allows, padded to ``length``; ``number`` counts them."""
        return self._rows(size, length, (0, HELD_OUT, *size), number, held_out=True)

    def loss(self, output: Mapping[str, Array], batch: Batch) -> Mean:
        """(sum of nats, number of targets), from ``output["nll"]`` float [B, L]."""
        return weighted_sum(output["nll"], jnp.asarray(batch["weights"]))

    def metrics(self, output: Mapping[str, Array], batch: Batch) -> dict[str, Mean]:
        """``loss``; with ``output["hits"]`` bool [B, L], whether a target is the most likely token, also
        ``accuracy`` of answers and ``exact_match`` of rows.

        Of held-out batches also ``accuracy_LENGTH_ITEMS`` and ``accuracy_from_DISTANCE`` (to below twice as
        much), where they are asked for.
        """
        metrics = {"loss": self.loss(output, batch)}
        if "hits" not in output:
            return metrics
        asked = (jnp.asarray(batch["distance"]) > 0) * (jnp.asarray(batch["weights"]) > 0).astype(jnp.float32)
        right = jnp.asarray(output["hits"]).astype(jnp.float32)
        wrong = jnp.sum(asked * (1 - right), axis=1)
        metrics |= {
            "accuracy": weighted_sum(right, asked),
            "exact_match": weighted_sum((wrong == 0).astype(jnp.float32), asked.max(axis=1)),
        }
        if "size" not in batch:
            return metrics
        if "size" in self.config.slices and len(self.config.evaluated) > 1:
            for i, (length, items) in enumerate(self.config.evaluated):
                here = asked * (jnp.asarray(batch["size"]) == i)[:, None]
                metrics[f"accuracy_{length}_{items}"] = weighted_sum(right, here)
        if "distance" in self.config.slices:
            octave = 31 - jax.lax.clz(jnp.asarray(batch["distance"]))
            for power in range(max(self._eval_lengths).bit_length()):
                metrics[f"accuracy_from_{2**power}"] = weighted_sum(right, asked * (octave == power))
        return metrics

    def chance(self) -> dict[Size, float]:
        """Accuracy of who knows the law and reads nothing, by size of held-out rows."""
        return {size: self.law.chance(size[1]) for size in self.config.evaluated}

    def _length(self, size: Size) -> int:
        """Tokens of a row; laws that take as many as needed say so by a length of 0."""
        length, items = size
        return length or self.law.fitted(0, items)[0]

    def _times(self, lengths: list[int]) -> list[int]:
        """How many rows stand in place of one of the longest."""
        longest = max(lengths)
        shorter = self.config.equal_tokens and not self.config.one_length
        return [longest // n if shorter else 1 for n in lengths]

    def _rows(
        self, size: Size, length: int, stream: tuple[int, ...], number: np.ndarray, *, held_out: bool
    ) -> Rows:
        u = draws.uniforms(stream, number, self.law.width(*size))
        made = self.law.make(u, *size, held_out)
        if self.config.loss == "all":
            made = _all_targets(made)
        missing = max(length - made["tokens"].shape[1], 0)
        return {name: np.pad(array, ((0, 0), (0, missing))) for name, array in made.items()}


def _all_targets(made: Rows) -> Rows:
    """The same rows, learning every next token of their segments besides the answers."""
    ids = made["segment_ids"]
    follows = np.zeros(ids.shape, bool)
    follows[:, :-1] = (ids[:, 1:] == ids[:, :-1]) & (ids[:, :-1] > 0)
    asked = made["weights"] > 0
    targets = np.where(asked, made["targets"], np.where(follows, np.roll(made["tokens"], -1, axis=1), 0))
    return {**made, "targets": targets.astype(np.int32), "weights": (asked | follows).astype(np.float32)}

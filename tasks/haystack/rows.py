"""Training rows of needles in text, pure in the step and the row, and held-out sets of them by length."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tasks.corpus import Corpus
from tasks.haystack import GENERATORS
from tasks.haystack.config import LOSSES, NOISES, HaystackConfig
from tasks.haystack.noise import CorpusText, sentences
from tasks.haystack.types import EVALUATION, TRAINING, Noise, Request, Sample, TooShort
from tasks.packing import row_range
from tasks.tokenizer import Tokenizer
from tasks.types import Batch, Mean, weighted_sum

PROBES = 16  # samples of each task that say how short it can be
DRAWS = 50  # until a sample fits
Row = dict[str, np.ndarray]


class HaystackRows:
    """What ``config`` asks for, on the text of a language-modelling task.

    Raises:
        ValueError: a field that cannot work, or a task that does not fit into a row; names the field.
    """

    def __init__(
        self,
        config: HaystackConfig,
        tokenizer: Tokenizer | None,
        corpora: tuple[Corpus, Corpus],
        seq_len: int,
        eval_shape: tuple[int, int],
    ):
        if tokenizer is None:
            raise ValueError("task.haystack needs a tokenizer, and task.source is token arrays without one")
        _validate(config)
        self._config, self._tokenizer, self.seq_len, self._eval_shape = config, tokenizer, seq_len, eval_shape
        self._noise: list[Noise | None] = [None, None]  # of TRAINING and of EVALUATION
        if config.noise != "own":
            self._noise = [
                CorpusText(corpus, tokenizer) if config.noise == "text" else sentences for corpus in corpora
            ]
        needed = {name: self._needed(name, max(seq_len, eval_shape[1])) for name in config.tasks}
        longest = max(needed, key=lambda name: needed[name])
        if needed[longest] > seq_len:
            raise ValueError(
                f"task.haystack.tasks has {longest!r}, which needs rows of {needed[longest]} tokens; "
                f"task.seq_len={seq_len}"
            )
        self.shortest = max(config.shortest, needed[longest])
        self.eval_lengths = self._lengths(eval_shape[1])

    def into(self, batches: grain.MapDataset, rows: slice | None, batch_size: int) -> grain.MapDataset:
        """``batches`` of text (rows ``rows`` of them) with the share of their rows replaced."""
        start, _ = row_range(rows, batch_size)
        return batches.map_with_index(functools.partial(self._replace, start))

    def eval_sets(self, rows: slice | None = None) -> dict[str, grain.MapDataset]:
        """A set for every length, one sample a row, on keys that training never has."""
        count = math.ceil(self._config.eval_samples / self._eval_shape[0])
        return {
            f"haystack_{length}": grain.MapDataset.range(count).map(
                functools.partial(self._eval_batch, length, *row_range(rows, self._eval_shape[0]))
            )
            for length in self.eval_lengths
        }

    def longest(self, step: int) -> int:
        """Tokens of the longest samples at a step."""
        if step >= self._config.growth_steps:
            return self.seq_len
        grown = (self.seq_len / self.shortest) ** (step / self._config.growth_steps)
        return int(self.shortest * grown)

    def row(self, step: int, number: int) -> Row:
        """Row ``number`` of step ``step``: samples of drawn tasks and lengths, as many as fit."""
        rng = self._rng(TRAINING, step, number)
        longest, samples, room = self.longest(step), list[Sample](), self.seq_len
        while room >= self.shortest:
            length = round(self.shortest * (longest / self.shortest) ** rng.random())
            samples.append(self._sample(rng, TRAINING, min(length, room)))
            room -= len(samples[-1].prompt) + len(samples[-1].answer)
        return self._lay(samples, self.seq_len, self._config.loss == "answer")

    def _replace(self, start: int, step: int, batch: Mapping[str, np.ndarray]) -> Row:
        after = {name: array.copy() for name, array in batch.items()}
        after["marks"] = np.zeros_like(after["tokens"])
        for i in range(len(after["tokens"])):
            if self._rng(TRAINING, step, start + i, 1).random() < self._config.share:
                for name, value in self.row(step, start + i).items():
                    after[name][i] = value
        return after

    def _eval_batch(self, length: int, start: int, stop: int, index: int) -> Row:
        numbers = [index * self._eval_shape[0] + row for row in range(start, stop)]
        laid = []
        for number in numbers:
            there = number < self._config.eval_samples
            sample = (
                [self._sample(self._rng(EVALUATION, length, number), EVALUATION, length)] if there else []
            )
            laid.append(self._lay(sample, self._eval_shape[1], answer_only=True))
        return {name: np.stack([row[name] for row in laid]) for name in laid[0]}

    def _sample(self, rng: np.random.Generator, side: int, length: int) -> Sample:
        """A sample of at most ``length`` tokens, its answer counted, of a drawn task.

        Drawn again where one does not fit: ``shortest`` holds for all but rare ones of tasks that vary.
        """
        name = self._config.tasks[rng.integers(len(self._config.tasks))]
        for _ in range(DRAWS):
            with contextlib.suppress(TooShort):
                return self._generate(name, rng, side, length)
        raise TooShort(f"task.haystack: {DRAWS} samples of {name!r} do not fit into {length} tokens")

    def _generate(self, name: str, rng: np.random.Generator, side: int, length: int) -> Sample:
        """Drawn again with less noise where prompt and answer are longer: answers vary in length."""
        state, over = rng.bit_generator.state, 0
        while True:
            rng.bit_generator.state = state
            request = Request(rng, self._tokenizer, length - over, side, self._noise[side])
            sample = GENERATORS[name](request)
            too_long = len(sample.prompt) + len(sample.answer) - length
            if too_long <= 0:
                return sample
            over += too_long

    def _needed(self, name: str, upper: int) -> int:
        """The shortest length, its answer counted, that some samples of a task all fit into."""
        low, high = 1, upper + 1

        def fits(length: int) -> bool:
            try:
                for i in range(PROBES):
                    self._generate(name, self._rng(TRAINING, i, 0, 2), TRAINING, length)
            except TooShort:
                return False
            return True

        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        if high > upper:
            raise ValueError(
                f"task.haystack.tasks has {name!r}, which does not fit into task.seq_len={self.seq_len}"
            )
        return high

    def _lengths(self, eval_len: int) -> tuple[int, ...]:
        given = self._config.eval_lengths
        for length in given:
            if not self.shortest <= length <= eval_len:
                raise ValueError(
                    f"task.haystack.eval_lengths has {length}, which should lie in {self.shortest}.."
                    f"{eval_len}: what its tasks need, and task.eval_seq_len"
                )
        halves = (eval_len >> i for i in range(eval_len.bit_length()))
        return given or tuple(sorted(n for n in halves if n >= self.shortest))

    def _rng(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self._config.seed, *numbers))

    def _lay(self, samples: list[Sample], length: int, answer_only: bool) -> Row:
        """One row [L] of `tasks.types.token_batch_spec`, a segment a sample; ``marks`` are 1 at answers."""
        row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        row |= {"weights": np.zeros(length, np.float32), "marks": np.zeros(length, np.int32)}
        at = 0
        for number, sample in enumerate(samples, 1):
            ids = np.concatenate([sample.prompt, sample.answer, [self._tokenizer.separator_id]])
            here = slice(at, at + len(ids) - 1)
            asked = np.arange(len(ids) - 1) >= len(sample.prompt) - 1
            row["tokens"][here], row["targets"][here] = ids[:-1], ids[1:]
            row["segment_ids"][here], row["positions"][here] = number, np.arange(len(ids) - 1)
            row["weights"][here] = asked if answer_only else 1
            row["marks"][here] = asked
            row["marks"][here.stop - 1] = 0  # the end of the document
            at = here.stop
        return row


def answer_metrics(output: Mapping[str, Array], batch: Batch) -> dict[str, Mean]:
    """Of the tokens at ``marks``: ``answer_bits`` each, and more where ``output["hits"]`` bool [B, L] says
    which targets are the most likely token: ``answer_accuracy`` and, a row being one question,
    ``exact_match``. That is what greedy decoding gets right: until it is wrong it reads what is right."""
    asked = (jnp.asarray(batch["marks"]) > 0).astype(jnp.float32)
    nats, count = weighted_sum(output["nll"], asked)
    metrics = {"answer_bits": (nats / math.log(2), count)}
    if "hits" in output:
        hits = output["hits"].astype(jnp.float32)
        metrics["answer_accuracy"] = weighted_sum(hits, asked)
        exact = jnp.where(asked > 0, hits, 1).min(axis=1)
        metrics["exact_match"] = weighted_sum(exact, asked.max(axis=1))
    return metrics


def _validate(config: HaystackConfig) -> None:
    unknown = [name for name in config.tasks if name not in GENERATORS]
    if unknown or not config.tasks:
        raise ValueError(
            f"task.haystack.tasks={config.tasks} should name some of {', '.join(sorted(GENERATORS))}"
        )
    checks: dict[str, tuple[Callable[[], bool], str]] = {
        "share": (lambda: 0 < config.share <= 1, "above 0, at most 1"),
        "noise": (lambda: config.noise in NOISES, f"one of {', '.join(NOISES)}"),
        "loss": (lambda: config.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
        "shortest": (lambda: config.shortest >= 0, "at least 0"),
        "growth_steps": (lambda: config.growth_steps >= 0, "at least 0"),
        "eval_samples": (lambda: config.eval_samples >= 1, "at least 1"),
    }
    for field, (fits, wanted) in checks.items():
        if not fits():
            raise ValueError(f"task.haystack.{field}={getattr(config, field)!r} should be {wanted}")

"""Repeat After Me (Jelassi et al. 2024, arXiv:2402.01032): copy a string, or go on after an n-gram of it.

In characters, ``$`` opening and ``.`` ending an example:

* "copy": ``$string|string.``
* "prefix": ``$ngram|string|what follows the n-gram.``
* "suffix": ``$string|ngram what follows it.`` (without the blank)
* "duplicate": as "copy", of strings in which an n-gram stands twice.

Training rows are packed: strings of ``shortest`` to M letters until the row is full, each a segment of its
own (the authors' code resets nothing, and cuts the last one). An evaluation row is one string of exactly M
letters. The loss is on the answers and their end; accuracy is of the letters, exact match of whole answers.

Chance: 1 / letters. The oracle finds the n-gram in the string and goes on. Evaluation strings are never
training strings (`tasks.recall.draws.set_apart`).
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import numpy as np
from jaxtyping import Float, Int

from tasks.recall import draws
from tasks.recall.types import Rows, rows

VARIANTS = ("copy", "prefix", "suffix", "duplicate")


@dataclasses.dataclass
class RepeatSpec:
    """The law; a size is (L tokens, M letters of the longest string).

    Ids: the letters 0..letters - 1, then ``$``, ``|``, ``.`` and ``*``, which fills and is padding.

    Attributes:
        shortest: of training strings.
        n_gram: letters of an n-gram, for "prefix", "suffix" and "duplicate".
        answer: letters of an answer, 0 for all the rest.
    """

    variant: str = "copy"
    letters: int = 26
    shortest: int = 5
    n_gram: int = 3
    answer: int = 0

    @property
    def vocab_size(self) -> int:
        """Four special ids included."""
        return self.letters + 4

    @property
    def _gram(self) -> int:
        """Letters of the n-gram that is given."""
        return self.n_gram if self.variant in ("prefix", "suffix") else 0

    def check(self, length: int, items: int) -> None:
        """Raises ValueError: an unknown variant, strings too short, or rows too short for the longest."""
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is unknown; use one of {', '.join(VARIANTS)}")
        if self.letters < 2:
            raise ValueError(f"letters={self.letters} must be at least 2")
        if self.n_gram < 1:
            raise ValueError(f"n_gram={self.n_gram} must be at least 1")
        least = 2 * self.n_gram + 1 if self.variant == "duplicate" else self._gram + max(self.answer, 1)
        if not max(least, 2) <= self.shortest <= items:
            raise ValueError(
                f"shortest={self.shortest} must lie between {max(least, 2)}, for n_gram={self.n_gram} and "
                f"answer={self.answer}, and {items}, the longest string"
            )
        needed = self.fitted(length, items)[0]
        if length < needed:
            raise ValueError(
                f"{length} tokens have no room for a string of {items} letters and its answer; "
                f"{needed} would do"
            )

    def fitted(self, length: int, items: int) -> tuple[int, int]:
        """As long as an example of a string of ``items`` letters can be."""
        bars = 4 if self.variant == "prefix" else 3
        return bars + items + self._gram + (self.answer or items - self._gram), items

    def width(self, length: int, items: int) -> int:
        """Letters, length, place, sum and second place of each string."""
        return self._strings(length) * (items + 5)

    def make(self, u: Float[np.ndarray, "n w"], length: int, items: int, held_out: bool) -> Rows:
        """Rows; the distance is that from where a letter is predicted to the one before its source."""
        strings, sizes, place = self._draw(u, length, items, held_out)
        gram, prefix = self._gram, self.variant == "prefix"
        answers = np.minimum(sizes - place - gram, self.answer or items)
        ends = np.cumsum(sizes + gram + answers + (4 if prefix else 3), axis=1)
        begins = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
        real = ends <= length
        if held_out:
            real &= np.arange(real.shape[1]) == 0

        number = _numbers(ends, length)

        def of(values: np.ndarray) -> np.ndarray:
            return np.take_along_axis(values, number, 1)

        local, m, p, there = np.arange(length) - of(begins), of(sizes), of(place), of(real)
        there &= np.arange(length) < of(ends)
        body = 1 + (gram + 1 if prefix else 0)  # where the string begins
        bar = body + m
        given = 0 if prefix else gram  # letters between the bar and the answer
        tail = local - (bar + 1)  # >= 0 after the bar
        source = np.where(tail >= 0, p + (gram if prefix else 0) + tail, local - body)
        if prefix:
            source = np.where(local < body - 1, p + local - 1, source)
        dollar, bar_id, end_id, star = self.letters + np.arange(4)
        row = np.arange(len(u))[:, None]
        tokens = strings[row, number, np.clip(source, 0, items - 1)]
        tokens[local == 0] = dollar
        tokens[(local == bar) | (prefix & (local == body - 1))] = bar_id
        last = tail == given + of(answers)
        tokens[last] = end_id
        tokens[~there] = star
        answer = there & (tail >= given) & (tail < given + of(answers))
        asked = np.roll(answer, -1, axis=1)  # at the token before
        loss = asked | np.roll(last & there, -1, axis=1)
        asked[:, -1] = loss[:, -1] = False
        distance = np.where(asked, np.roll(local - (body + source), -1, axis=1), 0)
        return rows(
            tokens,
            np.where(loss, np.roll(tokens, -1, axis=1), 0),
            distance,
            weights=loss,
            segment_ids=np.where(there, number + 1, 0),
            positions=np.where(there, local, 0),
        )

    def chance(self, items: int) -> float:
        """Of a random letter."""
        return 1 / self.letters

    def oracle(self, tokens: Int[np.ndarray, "n L"], items: int) -> Int[np.ndarray, "n L"]:
        """What follows the n-gram in the string, and then the end, for each example of each row."""
        found = np.zeros_like(tokens)
        dollar, bar, end = self.letters, self.letters + 1, self.letters + 2
        for row, answers in zip(tokens.tolist(), found):
            for begin in [i for i, token in enumerate(row) if token == dollar]:
                stop = row.index(end, begin)
                *first, string, reply = _parts(row[begin + 1 : stop], bar)
                gram = first[0] if first else reply[: self._gram]
                after = next(i for i in range(len(string)) if string[i : i + len(gram)] == gram) + len(gram)
                asked = len(reply) - (0 if first else self._gram)
                answers[stop - asked - 1 : stop] = [*string[after : after + asked], end]
        return found

    def _strings(self, length: int) -> int:
        """The most that fit into a row."""
        return max(length // (3 + self.shortest + self._gram + max(self.answer, 1)), 1)

    def _draw(
        self, u: Float[np.ndarray, "n w"], length: int, items: int, held_out: bool
    ) -> tuple[Int[np.ndarray, "n s m"], Int[np.ndarray, "n s"], Int[np.ndarray, "n s"]]:
        """Strings, their lengths, and where the given n-gram first stands in each."""
        count = self._strings(length)
        parts = draws.split(u, count * items, *[count] * 5)
        strings = draws.integers(parts[0].reshape(-1, count, items), 0, self.letters)
        of_size, of_place, of_sum, of_low, of_high = parts[1:]
        sizes = draws.integers(of_size, self.shortest, items + 1)
        if held_out:
            sizes[:] = items
        if self.variant == "duplicate":  # neither place touches the last letter, which sets strings apart
            room = sizes - 2 * self.n_gram
            low, high = np.sort([draws.integers(of_low, 0, room), draws.integers(of_high, 0, room)], axis=0)
            index = np.arange(self.n_gram)
            copied = np.take_along_axis(strings, low[..., None] + index, 2)
            np.put_along_axis(strings, high[..., None] + self.n_gram + index, copied, 2)
        draws.set_apart(strings, sizes - 1, of_sum, self.letters, held_out)
        if not self._gram:
            return strings, sizes, np.zeros_like(sizes)
        place = draws.integers(of_place, 0, sizes - self._gram - max(self.answer, 1) + 1)
        windows = np.lib.stride_tricks.sliding_window_view(strings, self._gram, axis=2)
        wanted = np.take_along_axis(windows, place[..., None, None], 2)
        return strings, sizes, np.argmax((windows == wanted).all(-1), axis=2)


def _numbers(ends: Int[np.ndarray, "n s"], length: int) -> Int[np.ndarray, "n L"]:
    """Which example each token belongs to, by where they end; the last for tokens after all."""
    count, examples = ends.shape
    marks = np.zeros((count, length + 1), np.int64)
    np.add.at(marks, (np.arange(count)[:, None], np.minimum(ends, length)), 1)
    return np.minimum(np.cumsum(marks, axis=1)[:, :-1], examples - 1)


def _parts(tokens: list[int], bar: int) -> list[list[int]]:
    """``tokens`` split at the bars."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == bar:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts

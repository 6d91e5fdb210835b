"""Birdie's objectives (Blouin et al. 2024, arXiv:2411.01030): rows of text made questions on themselves.

``marker input begin label end``: the marker names the objective, the loss is on label and end. Each objective
takes as many tokens as fit, so that a row of L tokens becomes a row of at most L. Spans to hide are drawn as
T5 draws them (a fixed number of a fixed total; the authors' code walks through the text at random), and stand
for by sentinels; the authors write markers and sentinels in text, here they are ids of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

Tokens = Int[np.ndarray, " n"]
Parts = tuple[np.ndarray, np.ndarray]  # input, label

KINDS = ("next_token", "prefix_lm", "infill", "copy", "deshuffle", "autoencode", "select")
SENTINELS = 100


@dataclasses.dataclass(frozen=True)
class Ids:
    """Special ids, from ``first`` on."""

    first: int

    @property
    def begin(self) -> int:
        """Ends the input; what follows is asked for."""
        return self.first + len(KINDS)

    @property
    def end(self) -> int:
        """Ends the label."""
        return self.begin + 1

    @property
    def context(self) -> int:
        """Stands between the questions of `select` and the text."""
        return self.begin + 2

    @property
    def between(self) -> int:
        """Stands between what goes before and after the span that is asked for."""
        return self.begin + 3

    @property
    def hidden(self) -> int:
        """In place of an input token that is masked (`tasks.mixture`)."""
        return self.begin + 4

    def marker(self, kind: str) -> int:
        """Opens the input of an objective."""
        return self.first + KINDS.index(kind)

    def sentinel(self, number: int) -> int:
        """Stands for a span that is left out."""
        return self.begin + 5 + number

    @property
    def stop(self) -> int:
        """One more than the last."""
        return self.sentinel(SENTINELS)


COUNT = Ids(0).stop
"""Special ids in all."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective at one setting.

    Attributes:
        kind: of :data:`KINDS`; settings of a kind share its reward.
        fit: how many tokens of text a row of L tokens has room for.
        build: ``(rng, text, ids) -> (input, label)``.
    """

    kind: str
    fit: Callable[[int], int]
    build: Callable[[np.random.Generator, Tokens, Ids], Parts]


def prefix_lm(share: float) -> Objective:
    """The rest of a text whose first ``share`` is given; no end."""

    def build(rng: np.random.Generator, text: Tokens, ids: Ids) -> Parts:
        cut = min(max(round(share * len(text)), 1), len(text) - 1)
        return text[:cut], text[cut:]

    return Objective("prefix_lm", lambda length: length - 2, build)


def infill(rate: float, span: int) -> Objective:
    """Spans of ``span`` tokens on average, ``rate`` of the text, behind sentinels: tell what they hide."""

    def build(rng: np.random.Generator, text: Tokens, ids: Ids) -> Parts:
        hidden = _spans(rng, len(text), rate, span)
        return _with_sentinels(text, hidden, ids), _behind_sentinels(text, hidden, ids)

    def fit(length: int) -> int:
        return _largest(length - 3, lambda n: n + 2 * _count(n, rate, span)[1])

    return Objective("infill", fit, build)


def copy() -> Objective:
    """The text again."""
    return Objective("copy", lambda length: (length - 3) // 2, lambda rng, text, ids: (text, text))


def deshuffle(share: float) -> Objective:
    """The text, of which ``share`` of the tokens have changed places."""

    def build(rng: np.random.Generator, text: Tokens, ids: Ids) -> Parts:
        moved = rng.choice(len(text), round(share * len(text)), replace=False)
        shuffled = text.copy()
        shuffled[moved] = text[rng.permutation(moved)]
        return shuffled, text

    return Objective("deshuffle", lambda length: (length - 3) // 2, build)


def autoencode(rate: float, span: int, *, shuffled: bool = False) -> Objective:
    """The whole text, of which spans are hidden and the rest, if ``shuffled``, has changed places."""

    def build(rng: np.random.Generator, text: Tokens, ids: Ids) -> Parts:
        hidden = _spans(rng, len(text), rate, span)
        given = _with_sentinels(text, hidden, ids)
        return (rng.permutation(given) if shuffled else given), text

    def fit(length: int) -> int:
        def needed(n: int) -> int:
            tokens, spans = _count(n, rate, span)
            return 2 * n - tokens + spans

        return _largest(length - 3, needed)

    return Objective("autoencode", fit, build)


def select(
    *, before: bool, spans: tuple[int, int] = (1, 4), size: tuple[int, int] = (4, 32), around: int = 8
) -> Objective:
    """Spans of the text, each asked for by what stands before and after it, as questions before the text or
    after it.

    Args:
        spans, size: their number (one for each 192 tokens at most) and their lengths, from and to.
        around: tokens, at most, on each side of a span that ask for it.
    """
    each = 2 + 2 * around + 1 + size[1]  # tokens of a question and its answer, at most

    def most(n: int) -> int:
        return min(max(n // 192, spans[0]), spans[1])

    def build(rng: np.random.Generator, text: Tokens, ids: Ids) -> Parts:
        # Spans lie in equal pieces of the text, so that they do not overlap.
        count = int(rng.integers(spans[0], most(len(text)) + 1))
        piece = len(text) // count
        questions, answers = list[np.ndarray](), list[np.ndarray]()
        for number, place in enumerate(rng.permutation(count)):
            left, right = rng.integers(1, around + 1, 2)
            length = min(int(rng.integers(size[0], size[1] + 1)), piece - left - right)
            start = place * piece + left + int(rng.integers(piece - left - right - length + 1))
            name = [ids.sentinel(number)]
            sides = text[start - left : start], text[start + length :][:right]
            questions.append(np.concatenate([name, sides[0], [ids.between], sides[1]]))
            answers.append(np.concatenate([name, text[start : start + length]]))
        asked = np.concatenate(questions)
        first, second = (asked, text) if before else (text, asked)
        given = np.concatenate([first, [ids.context], second])
        return given.astype(text.dtype), np.concatenate(answers).astype(text.dtype)

    return Objective("select", lambda length: _largest(length - 4, lambda n: n + each * most(n)), build)


OBJECTIVES: dict[str, Objective | None] = {
    "next_token": None,
    "prefix_lm": prefix_lm(0.75),
    "infill_5_32": infill(0.05, 32),
    "infill_15_3": infill(0.15, 3),
    "infill_15_8": infill(0.15, 8),
    "infill_50_3": infill(0.5, 3),
    "infill_50_32": infill(0.5, 32),
    "copy": copy(),
    "deshuffle_50": deshuffle(0.5),
    "deshuffle_100": deshuffle(1.0),
    "autoencode": autoencode(0.15, 8),
    "autoencode_85": autoencode(0.85, 32),
    "autoencode_shuffled": autoencode(0.15, 8, shuffled=True),
    "select_before": select(before=True),
    "select_after": select(before=False),
}
"""By name; None leaves a row as it is. Shares in percent, then tokens of a span."""

SHORTEST, SHORTEST_SELECT = 16, 64  # tokens of text that a row should have room for


def kind(name: str) -> str:
    """The kind of an objective of :data:`OBJECTIVES`."""
    objective = OBJECTIVES[name]
    return "next_token" if objective is None else objective.kind


def shortest_row(name: str) -> int:
    """The fewest tokens that a row of the objective can have."""
    objective = OBJECTIVES[name]
    if objective is None:
        return 1
    least = SHORTEST_SELECT if objective.kind == "select" else SHORTEST
    length = least
    while objective.fit(length) < least:
        length += 1
    return length


def row(objective: Objective, rng: np.random.Generator, text: Tokens, ids: Ids) -> dict[str, np.ndarray]:
    """Fields of one row [L] of a token batch, made of the first tokens of ``text`` [L], and ``prefix``,
    bool: before "begin", where a model may read both ways."""
    length = len(text)
    given, label = objective.build(rng, text[: objective.fit(length)], ids)
    marker, end = [ids.marker(objective.kind)], [ids.end] if objective.kind != "prefix_lm" else []
    whole = np.concatenate([marker, given, [ids.begin], label, end]).astype(np.int32)
    assert len(whole) <= length + 1  # the last token is a target only
    begin, place = 1 + len(given), np.arange(length)
    real = place < len(whole) - 1
    tokens, targets = np.zeros((2, length), np.int32)
    tokens[real], targets[real] = whole[:-1], whole[1:]
    return {
        "tokens": tokens,
        "targets": np.where(place >= begin, targets, 0).astype(np.int32),
        "weights": (real & (place >= begin)).astype(np.float32),
        "segment_ids": real.astype(np.int32),
        "positions": np.where(real, place, 0).astype(np.int32),
        "prefix": place < begin,
    }


def _count(n: int, rate: float, span: int) -> tuple[int, int]:
    """How many tokens to hide in how many spans."""
    tokens = min(max(round(rate * n), 1), n - 1)
    spans = min(max(round(tokens / span), 1), tokens, n - tokens, SENTINELS)
    return tokens, spans


def _largest(room: int, needed: Callable[[int], int]) -> int:
    """The largest n whose needs fit, 0 for none; ``needed`` grows with n, but for roundings."""
    n = max(room, 0)
    while n > 1 and needed(n) > room:
        n -= 1
    return n if n > 1 else 0


def _spans(rng: np.random.Generator, n: int, rate: float, span: int) -> Int[np.ndarray, "k 2"]:
    """Begin and end of each hidden span; at least one token is given before each."""
    tokens, spans = _count(n, rate, span)

    def cut(total: int) -> np.ndarray:
        """``total`` as ``spans`` lengths of at least 1, all such sums equally likely."""
        inner = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff([0, *inner, total])

    hidden, given = cut(tokens), cut(n - tokens)
    ends = np.cumsum(hidden + given)
    return np.stack([ends - hidden, ends], axis=1)


def _with_sentinels(text: Tokens, spans: Int[np.ndarray, "k 2"], ids: Ids) -> np.ndarray:
    parts, before = [], 0
    for number, (begin, end) in enumerate(spans):
        parts += [text[before:begin], [ids.sentinel(number)]]
        before = end
    return np.concatenate([*parts, text[before:]]).astype(text.dtype)


def _behind_sentinels(text: Tokens, spans: Int[np.ndarray, "k 2"], ids: Ids) -> np.ndarray:
    parts = [np.concatenate([[ids.sentinel(i)], text[a:b]]) for i, (a, b) in enumerate(spans)]
    return np.concatenate(parts).astype(text.dtype)

"""What a haystack is: a prompt that hides facts in text, and the answer that they give."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from tasks.tokenizer import Tokenizer

TRAINING, EVALUATION = 0, 1  # sides, which share no keys and no values
HELD_OUT = 5  # one key in so many is for evaluation

Noise = Callable[[np.random.Generator, int], str]
"""``noise(rng, characters)``: exactly that many characters of text."""
T = TypeVar("T")


class TooShort(ValueError):
    """A length has no room for the prompt; the message says what has."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question about a text.

    Attributes:
        prompt: ids int32 [L], the document start first.
        answer: ids int32 [A] that are to follow.
        references: strings of which the answer is made; each should be in what a model says.
        fact: index in ``prompt`` of the first token of the first statement about what is asked.
        stops: the answer ends in a number, after which no digit may follow.
    """

    prompt: Int[np.ndarray, " L"]
    answer: Int[np.ndarray, " A"]
    references: tuple[str, ...]
    fact: int
    stops: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """What a generator is asked for.

    Attributes:
        rng: all that is drawn comes from it.
        tokenizer: of the model.
        length: tokens that the prompt has at most, the document start included.
        side: TRAINING or EVALUATION.
        noise: text to hide the facts in; None for what the task was published with.
        depth: where the fact stands, from 0 (beginning) to 1; None to draw it. Tasks of several facts draw
            their places.
    """

    rng: np.random.Generator
    tokenizer: Tokenizer
    length: int
    side: int = EVALUATION
    noise: Noise | None = None
    depth: float | None = None

    def text(self, noise: Noise) -> str:
        """More text than ``length`` tokens can be, of ``self.noise`` or else of ``noise``."""
        return (self.noise or noise)(self.rng, characters(self.tokenizer, self.length))


def characters(tokenizer: Tokenizer, tokens: int) -> int:
    """At least as many as ``tokens`` tokens of English or code hold."""
    return tokens if tokenizer.vocab_size <= 257 else 8 * tokens


def side_of(text: str) -> int:
    """The side that a key or a value belongs to. A hash, so that nothing about it can be learned."""
    return EVALUATION if zlib.crc32(text.encode()) % HELD_OUT == 0 else TRAINING


def of_side(draw: Callable[[], str], side: int) -> str:
    """The first of ``draw()`` that belongs to ``side``."""
    while True:
        text = draw()
        if side_of(text) == side:
            return text


def different(draw: Callable[[], str], count: int) -> list[str]:
    """The first ``count`` of ``draw()`` that differ from each other."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def largest(
    build: Callable[[int], T],
    tokens: Callable[[T], int],
    limit: int,
    upper: int,
    each: int | float,
    name: str,
) -> T:
    """``build(size)`` of the largest size in 0..upper that has at most ``limit`` tokens.

    Args:
        tokens: of what was built; grows with the size, about in proportion.
        each: tokens of one more, as a first guess.
        name: of the task, for the message.

    Raises:
        TooShort: ``build(0)`` has more.
    """
    size, best = 0, build(0)
    empty = found = tokens(best)
    if found > limit:
        raise TooShort(
            f"{name}: a length of {limit} tokens is shorter than its prompt without any noise; it needs "
            f"{found}"
        )
    beyond = upper + 1
    while beyond - size > 1:
        guess = min(max(size + int((limit - found) / each), size + 1), beyond - 1)
        built = build(guess)
        count = tokens(built)
        if count <= limit:
            size, best, found = guess, built, count
            each = max((found - empty) / size, 1e-3)
        else:
            beyond, each = guess, 2 * each
    return best


def weave(
    noise: Sequence[str], facts: Sequence[str], places: Sequence[float], between: str
) -> tuple[str, list[int]]:
    """``noise`` and ``facts`` joined by ``between``, and where each fact begins (characters).

    Args:
        places: of the facts, ascending, as shares of ``noise``.
    """
    pieces, starts, place, at = [], [], 0, 0

    def add(piece: str) -> None:
        nonlocal at
        pieces.append(piece)
        at += len(piece) + len(between)

    for fact, share in zip(facts, places, strict=True):
        until = round(share * len(noise))
        for piece in noise[place:until]:
            add(piece)
        place = until
        starts.append(at)
        add(fact)
    for piece in noise[place:]:
        add(piece)
    return between.join(pieces), starts


def sample_of(
    tokenizer: Tokenizer,
    before: str,
    after: str,
    answer: str,
    references: Sequence[str],
    *,
    stops: bool = False,
) -> Sample:
    """The sample of the prompt ``before + after``, whose first needed fact begins ``after``."""
    return Sample(
        prompt=tokenizer.encode(before + after, separator=True),
        answer=tokenizer.encode(answer),
        references=tuple(references),
        fact=1 + len(tokenizer.encode(before)),
        stops=stops,
    )

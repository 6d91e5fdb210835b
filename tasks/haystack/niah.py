"""RULER's needles (arXiv:2404.06654): values of keys, stated in one sentence each and asked for at the end.

Keys are words made by rule in place of a list of adjectives and nouns; the "essay" haystack is whatever text
the request has, sentences made by rule if it has none; depths are uniform, not 40 fixed ones.
"""

from __future__ import annotations

import dataclasses
import functools

from tasks.haystack import words
from tasks.haystack.noise import GRASS, pieces, sentences
from tasks.haystack.types import Request, Sample, different, largest, of_side, sample_of, weave

ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text? The special magic {kind} "
    "for {query} mentioned in the provided text is",
)
MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {kind}s afterwards.\n",
    "\nWhat are all the special magic {kind}s for {query} mentioned in the provided text? The special magic "
    "{kind}s for {query} mentioned in the provided text are",
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
DIGITS = 7


@dataclasses.dataclass(frozen=True)
class Needles:
    """One of the tasks.

    Attributes:
        haystack: "noise" (the published line), "essay" (text) or "needle" (needles that nobody asks for).
        keys: "words" or "uuid"; ``values``: "number" or "uuid".
        stated: keys with a needle; of which ``asked`` are asked for, each of ``values_each`` values.
    """

    haystack: str
    keys: str = "words"
    values: str = "number"
    stated: int = 1
    values_each: int = 1
    asked: int = 1


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuid"),
    "niah_multikey_1": Needles("essay", stated=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuid", values="uuid"),
    "niah_multivalue": Needles("essay", values_each=4),
    "niah_multiquery": Needles("essay", stated=4, asked=4),
}


def generate(name: str, request: Request) -> Sample:
    """A sample of the task: the answer is the values asked for, in the order of the question.

    Raises:
        TooShort: ``request.length`` has no room for the needles.
    """
    task, rng = TASKS[name], request.rng
    needles, asked, values = _needles(task, request)
    places = rng.random(len(needles))
    if request.depth is not None and len(needles) == 1:
        places[0] = request.depth
    order = rng.permutation(len(needles))
    facts = [needles[i] for i in order]
    places.sort()
    kind = task.values
    listed = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    one = len(values) == 1
    before, after = (text.format(kind=kind, query=listed) for text in (ONE if one else MANY))
    noise, between = _haystack(task, request)
    wanted = [place for place, i in enumerate(order) if i < len(values)]  # those asked for come first

    def build(size: int) -> Sample:
        text, starts = weave(noise[:size], facts, list(places), between)
        at = starts[wanted[0]]
        answer = f" {', '.join(values)}"
        return sample_of(
            request.tokenizer, before + text[:at], text[at:] + after, answer, values, stops=kind == "number"
        )

    each = len(request.tokenizer.encode(noise[0] + between))
    return largest(build, lambda x: len(x.prompt), request.length, len(noise), each, name)


def _needles(task: Needles, request: Request) -> tuple[list[str], list[str], list[str]]:
    """All needles, those asked for first; the keys and the values asked for."""
    keys = different(lambda: _key(task, request), task.stated)
    asked = keys[: task.asked]
    count = task.stated * task.values_each
    values = different(lambda: _value(task, request), count)
    per = task.values_each
    needles = [NEEDLE.format(kind=task.values, key=keys[i // per], value=v) for i, v in enumerate(values)]
    return needles, asked, values[: task.asked * per]


def _haystack(task: Needles, request: Request) -> tuple[list[str], str]:
    """More pieces of noise than there is room for, and what is put between them."""
    if task.haystack == "essay":
        return pieces(request.text(sentences)), " "
    if task.haystack == "noise":
        return [GRASS] * (request.length * 8 // len(GRASS) + 1), "\n"

    def needle() -> str:
        return NEEDLE.format(kind=task.values, key=_key(task, request), value=_value(task, request))

    first = needle()
    count = 4 * request.length // (3 * len(request.tokenizer.encode(first)))  # none is a third shorter
    return [first, *(needle() for _ in range(count))], " "


def _key(task: Needles, request: Request) -> str:
    return words.pair(request.rng) if task.keys == "words" else words.uuid4(request.rng)


def _value(task: Needles, request: Request) -> str:
    def draw() -> str:
        number = task.values == "number"
        return words.number(request.rng, DIGITS) if number else words.uuid4(request.rng)

    return of_side(draw, request.side)


GENERATORS = {name: functools.partial(generate, name) for name in TASKS}

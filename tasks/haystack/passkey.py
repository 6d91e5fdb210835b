"""Passkey retrieval: a number hidden in noise and asked for at the end, in every published style.

The styles differ in their words, in how noise is cut to length, in the law of the key and in what counts as
an answer: Landmark Attention (arXiv:2305.16300), LongLoRA (arXiv:2309.12307), Activation Beacon
(arXiv:2401.03462), InfiniteBench (arXiv:2402.13718), Stuffed Mamba (arXiv:2410.07145).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tasks.haystack.noise import GRASS
from tasks.haystack.types import Request, Sample, TooShort, characters, largest, of_side, sample_of
from tasks.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Style:
    """One way to ask.

    Attributes:
        intro, fact, question: the fixed text, line ends included; ``fact`` has two places for the key.
        noise: what is repeated before and after the fact, each time from its beginning.
        cut: noise is measured in "characters" (which share a budget), "tokens" (the prompt then has exactly
            the length), "lines" (whole repetitions) or "blocks" (the fact takes the place of one of them).
        keys: (lowest, highest), all equally likely.
        digits: that keys are written with at least, zeros in front.
        stops: the first number in what the model says is the answer, so that it must end where the key does;
            else as many tokens as the key has are compared.
    """

    intro: str
    fact: str
    question: str
    noise: str
    cut: str
    keys: tuple[int, int]
    digits: int = 1
    stops: bool = True


LANDMARK = Style(
    intro="There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n",
    fact="\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
    question="\nWhat is the pass key? The pass key is",
    noise=f"{GRASS} ",
    cut="characters",
    keys=(1, 50000),
)
STYLES = {
    "landmark": LANDMARK,
    "longlora": dataclasses.replace(LANDMARK, keys=(1, 49999), stops=False),
    # In place of a chat template, which a base model does not know, the question is followed by the lead.
    "beacon": Style(
        intro="There is an important infomation hidden in the following context. Find the information and "
        "memorize it. I will quiz you about the important information there.\n",
        fact="\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n",
        question="\n\nWhat is the pass key? The pass key is",
        noise=GRASS,
        cut="tokens",
        keys=(10000, 99999),
    ),
    "infinitebench": Style(
        intro="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
        "I will quiz you about the important information.\n\n",
        fact="The pass key is {key}. Remember it. {key} is the pass key.\n",
        question="\nWhat is the pass key?\n\nThe pass key is",
        noise=f"{GRASS}\n",
        cut="lines",
        keys=(0, 99999),
        digits=5,
    ),
    "stuffed_mamba": Style(
        intro="There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
        "\n\n",
        fact="The passkey is {key}. Remember it. {key} is the passkey.\n",
        question="\nWhat is the pass key? The passkey is",
        noise=f"{GRASS}\n",
        cut="blocks",
        keys=(0, 99999),
        digits=5,
        stops=False,
    ),
}


def passkey(
    style: str, tokenizer: Tokenizer, total_len: int, depth: float, key: str, noise: str | None = None
) -> Sample:
    """The prompt of a style, of as much noise as ``total_len`` tokens have room for.

    "beacon" has exactly ``total_len`` tokens, with any tokenizer; "landmark" and "longlora" have with bytes;
    the others, whose noise is whole lines, at most. The answer is not counted, the document start is.

    Args:
        depth: share of the noise that comes before the key, 0 to 1.
        key: as it is written.
        noise: text to cut the noise from instead of the style's own; longer than ``total_len`` tokens.

    Raises:
        TooShort: the length has no room for the prompt without noise.
        ValueError: an unknown style, a depth outside 0..1, a key that is no number.
    """
    if style not in STYLES:
        raise ValueError(f"passkey: unknown style {style!r}; use one of {', '.join(STYLES)}")
    if not 0 <= depth <= 1 or not key.isdecimal():
        raise ValueError(f"passkey: depth={depth} should lie in 0..1, and key={key!r} be a number")
    s = STYLES[style]
    pool = s.noise * (characters(tokenizer, total_len) // len(s.noise) + 1) if noise is None else noise
    prompt = _Prompt(s, tokenizer, total_len, depth, key, pool, own=noise is None)
    return {"tokens": prompt.by_tokens, "blocks": prompt.by_blocks}.get(s.cut, prompt.by_size)()


def draw_key(style: str, rng: np.random.Generator, side: int | None = None) -> str:
    """A key by the law of the style, written as the style does.

    Args:
        side: only of the keys of TRAINING or EVALUATION; None for all, as published.
    """
    s = STYLES[style]

    def draw() -> str:
        return str(rng.integers(s.keys[0], s.keys[1] + 1)).zfill(s.digits)

    return draw() if side is None else of_side(draw, side)


def chance(style: str) -> dict[str, float]:
    """What knowing nothing but the law of the keys gives: the share of exact answers, the nats of a key."""
    count = STYLES[style].keys[1] - STYLES[style].keys[0] + 1
    return {"exact_match": 1 / count, "nats": float(np.log(count))}


def generate(style: str, request: Request) -> Sample:
    """A key of the side, at a depth that is given or drawn; `tasks.haystack.types.Request`."""
    depth = float(request.rng.random()) if request.depth is None else request.depth
    noise = None
    if request.noise is not None:
        noise = request.noise(request.rng, characters(request.tokenizer, request.length))
    key = draw_key(style, request.rng, request.side)
    return passkey(style, request.tokenizer, request.length, depth, key, noise)


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A prompt to be made of a style; ``pool`` is what noise is cut from, ``own`` whether the style's."""

    style: Style
    tokenizer: Tokenizer
    length: int
    depth: float
    key: str
    pool: str
    own: bool

    def by_size(self) -> Sample:
        """The largest number of characters, or of lines as long as the style's, that fits."""
        line = self.style.noise
        unit = 1 if self.style.cut == "characters" else len(line)
        each = len(self.tokenizer.encode(line)) * unit / len(line)

        def build(size: int) -> Sample:
            return self._with_noise(round(self.depth * size) * unit, size * unit)

        return largest(build, lambda x: len(x.prompt), self.length, len(self.pool) // unit, each, "passkey")

    def by_tokens(self) -> Sample:
        """Parts encoded apart and cut between tokens, so that the length is exact."""
        start = self.tokenizer.encode(self.style.intro, separator=True)
        fact = self.tokenizer.encode(self.style.fact.format(key=self.key))
        question = self.tokenizer.encode(self.style.question)
        room = self.length - len(start) - len(fact) - len(question)
        if room < 0:
            raise self._too_short("without any noise", self.length - room)
        noise = self.tokenizer.encode(self.pool)
        before = round(max(room - 1, 0) * self.depth)
        after = noise[: room - before] if self.own else noise[before:room]
        prompt = np.concatenate([start, noise[:before], fact, after, question])
        answer, stops = self.tokenizer.encode(f" {self.key}"), self.style.stops
        return Sample(prompt, answer, (self.key,), len(start) + before, stops)

    def by_blocks(self) -> Sample:
        """n = (length - intro - question) // block blocks, the fact in place of number int(depth (n - 1))."""
        fixed = [self.style.intro, self.style.question, self.style.noise]
        intro, question, block = (len(self.tokenizer.encode(text)) for text in fixed)
        count = (self.length - 1 - intro - question) // block
        if count < 1:
            raise self._too_short("with one block", 1 + intro + question + block)
        unit = len(self.style.noise)
        return self._with_noise(int(self.depth * (count - 1)) * unit, (count - 1) * unit)

    def _with_noise(self, before: int, total: int) -> Sample:
        """``before`` of ``total`` characters of noise before the fact; the style's own begins anew after."""
        s = self.style
        first = self.pool[:before]
        second = self.pool[: total - before] if self.own else self.pool[before:total]
        if not self.own and s.cut != "characters":  # lines end, whatever the text
            first, second = (part and f"{part[:-1]}\n" for part in (first, second))
        rest = s.fact.format(key=self.key) + second + s.question
        answer = f" {self.key}"
        return sample_of(self.tokenizer, s.intro + first, rest, answer, [self.key], stops=s.stops)

    def _too_short(self, what: str, needed: int) -> TooShort:
        return TooShort(
            f"passkey: a length of {self.length} tokens is shorter than its prompt {what}; it needs {needed}"
        )


GENERATORS = {style: functools.partial(generate, style) for style in STYLES}

"""RULER's tasks beyond needles (arXiv:2404.06654): variable tracking, common words, frequent words."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Iterable

import numpy as np

from tasks.haystack import words
from tasks.haystack.noise import GRASS
from tasks.haystack.types import Request, Sample, TooShort, different, largest, of_side, sample_of, weave

HOPS = 4
COMMON = 10  # words to be found
MANY, FEW = (30, 3), (6, 1)  # how often common and other words stand in a list; FEW in short ones
LONG_LIST = 4096  # tokens
ALPHA = 2.0  # of the zeta law
CODED = 6  # letters of a coded word
ASKED = 3  # frequent words: ranks 2 to 4
TRACK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According "
    "to the chain(s) of variable assignment in the text above, {count} variables are assigned the value "
    "{value}, they are: ",
)
COUNT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
    "ones that appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear "
    "most often in the list are:",
)
CODE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text? Answer: According to the coded text above, the three "
    "most frequently appeared words are:",
)


def variable_tracking(request: Request) -> Sample:
    """``VAR AAAAA = 12345``, ``VAR BBBBB = VAR AAAAA``, ... in the published noise: all names are asked for.

    One chain of four hops, without the solved example that RULER puts before it. Raises TooShort.
    """
    rng = request.rng
    names = different(lambda: words.letters(rng, 5, string.ascii_uppercase), HOPS + 1)
    value = of_side(lambda: words.number(rng, 5), request.side)
    facts = [f"VAR {name} = {of}" for name, of in zip(names, [value, *(f"VAR {n}" for n in names)])]
    places = sorted(rng.random(len(facts)))
    after = TRACK[1].format(value=value, count=len(names))

    def build(size: int) -> Sample:
        text, starts = weave([GRASS] * size, facts, places, "\n")
        at = starts[0]
        return sample_of(request.tokenizer, TRACK[0] + text[:at], text[at:] + after, " ".join(names), names)

    each, upper = len(request.tokenizer.encode(f"{GRASS}\n")), request.length * 8 // len(GRASS)
    return largest(build, lambda x: len(x.prompt), request.length, upper, each, "vt")


def common_words(request: Request) -> Sample:
    """A numbered list in which ten words stand more often than the others; a solved example stands before it.

    They stand 30 times and the others 3 times; 6 times and once in prompts below 4,096 tokens, and where
    words take so many tokens that the longer list has no room. Raises TooShort.
    """
    if request.length >= LONG_LIST:
        with contextlib.suppress(TooShort):
            return _common_words(request, MANY)
    return _common_words(request, FEW)


def _common_words(request: Request, often: tuple[int, int]) -> Sample:
    rng = request.rng
    # A word of the list takes at least three tokens each time.
    upper = max(request.length // (3 * often[1]), 1)
    pool = different(lambda: words.word(rng), 2 * COMMON + COMMON + upper)
    example, rest = pool[: 2 * COMMON], pool[2 * COMMON :]
    shown, solved = _list(rng, example[:COMMON], example[COMMON:], 3, 1)
    before = f"{COUNT[0]}{shown}{COUNT[1]}{solved}\n{COUNT[0]}"
    common, others = rest[:COMMON], rest[COMMON:]
    seed = int(rng.integers(2**31))

    def build(size: int) -> Sample:
        text, answer = _list(np.random.default_rng(seed), common, others[:size], *often)
        return sample_of(request.tokenizer, before, text + COUNT[1], answer, common)

    each = len(request.tokenizer.encode(f"100. {others[0]} ")) * often[1]
    return largest(build, lambda x: len(x.prompt), request.length, len(others), each, "cwe")


def _list(
    rng: np.random.Generator, common: list[str], others: list[str], many: int, few: int
) -> tuple[str, str]:
    """The shuffled list, numbered, and the answer, numbered too."""
    entries = [*common * many, *others * few]
    shuffled = (entries[i] for i in rng.permutation(len(entries)))
    return _numbered(shuffled), f" {_numbered(common)}"


def _numbered(entries: Iterable[str]) -> str:
    return " ".join(f"{i}. {entry}" for i, entry in enumerate(entries, 1))


def frequent_words(request: Request) -> Sample:
    """Coded words by a zeta law, of which the most frequent is written as dots; the next three are asked for.

    Raises:
        TooShort: so short a text does not tell the three from the fourth.
    """
    rng = request.rng
    vocabulary = max(request.length // 50, ASKED + 2)
    coded = ["...", *different(lambda: words.letters(rng, CODED), vocabulary - 1)]
    weights = np.arange(1, vocabulary + 1) ** -ALPHA
    weights *= 6 / np.pi**2  # zeta(2)
    wanted, seed = coded[1 : 1 + ASKED], int(rng.integers(2**31))
    upper = request.length

    def build(size: int) -> Sample:
        counts = np.floor(size * weights).astype(int)
        entries = np.repeat(np.arange(vocabulary), counts)
        text = " ".join(coded[i] for i in np.random.default_rng(seed).permutation(entries))
        return sample_of(request.tokenizer, CODE[0], text + CODE[1], f" {', '.join(wanted)}", wanted)

    each = max(len(request.tokenizer.encode(f"{coded[1]} ")) / 2, 1)
    sample = largest(build, lambda x: len(x.prompt), request.length, upper, each, "fwe")
    written = request.tokenizer.decode(sample.prompt).split()
    last, next_ = (written.count(coded[i]) for i in (ASKED, ASKED + 1))
    if last <= next_:
        raise TooShort(
            f"fwe: in a text of {request.length} tokens the third word stands {last} times and the fourth "
            f"{next_} times; it needs more"
        )
    return sample


GENERATORS = {"vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}

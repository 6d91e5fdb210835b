"""Words, numbers and names made by rule, so that no list of them needs to be shipped."""

from __future__ import annotations

import string
import uuid

import numpy as np

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def word(rng: np.random.Generator, syllables: int = 3) -> str:
    """A pronounceable word of consonants and vowels in turn: 70 syllables."""
    parts = zip(rng.integers(len(CONSONANTS), size=syllables), rng.integers(len(VOWELS), size=syllables))
    return "".join(CONSONANTS[c] + VOWELS[v] for c, v in parts)


def pair(rng: np.random.Generator) -> str:
    """Two words joined by a hyphen, in the place of RULER's adjective and noun."""
    return f"{word(rng)}-{word(rng, 2)}"


def number(rng: np.random.Generator, digits: int) -> str:
    """A number of exactly so many digits, the first not 0."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def letters(rng: np.random.Generator, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """That many letters."""
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=count))


def uuid4(rng: np.random.Generator) -> str:
    """A random UUID, version 4."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))

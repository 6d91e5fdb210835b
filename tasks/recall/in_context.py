"""In-context recall of MAD (Poli et al. 2024, arXiv:2403.17844), with noise or with longer keys and values.

Pairs of key and value follow each other; a key keeps its value within a row, and is asked for wherever it
comes again. Noise, ids of its own, stands in place of a share of the pairs.

Chance: 1 / V for the V values. The oracle remembers the value of each key. Rows of evaluation are drawn
independently: with eight keys and eight values there are 2**24 maps, all of them for both.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import numpy as np
from jaxtyping import Float, Int

from tasks.recall import draws
from tasks.recall.types import Rows, rows


@dataclasses.dataclass
class InContextSpec:
    """The law; a size is (T tokens, K keys). MAD's is (128, 8), training on all next tokens.

    Ids: the keys, as many values, and ``noise_vocab`` ids of noise. "Noisy" recall has vocab_size=32,
    noise_vocab=16 and noise=0.2.
    """

    vocab_size: int = 16
    noise_vocab: int = 0
    noise: float = 0.0

    @property
    def keys(self) -> int:
        """Number of keys, and of values."""
        return (self.vocab_size - self.noise_vocab) // 2

    def fitted(self, length: int, items: int) -> tuple[int, int]:
        """Even, of no more keys than there are."""
        return max(length + length % 2, 4), min(items, self.keys)

    def check(self, length: int, items: int) -> None:
        """Raises ValueError: too few ids, noise without ids, or an odd length."""
        if not 0 <= self.noise < 1 or (self.noise and self.noise_vocab < 1):
            raise ValueError(
                f"noise={self.noise} must be in [0, 1), and noise_vocab={self.noise_vocab} above 0"
            )
        if not 1 <= items <= self.keys:
            raise ValueError(
                f"{items} keys, but vocab_size={self.vocab_size} with noise_vocab={self.noise_vocab} has "
                f"{self.keys}"
            )
        if length % 2 or length < 4:
            raise ValueError(f"{length} tokens should be an even number, at least 4")

    def width(self, length: int, items: int) -> int:
        """Values; keys, whether each is noise and which; the first pair that is none, the last question."""
        return items + length // 2 * 4 + 2

    def make(self, u: Float[np.ndarray, "n w"], length: int, items: int, held_out: bool) -> Rows:
        """Rows; the distance is that from a key to where it was last given."""
        n, pairs = len(u), length // 2
        of_value, of_key, of_noise, of_ids, of_last = draws.split(u, items, pairs, pairs, 2 * pairs, 2)
        values = draws.integers(of_value, 0, self.keys)
        keys = draws.integers(of_key, 0, items)
        noise = of_noise < self.noise
        noise[np.arange(n), draws.integers(of_last[:, 0], 0, pairs - 1)] = False
        noise[:, -1] = False
        # The last pair asks for one of the keys that were given, whichever it is with equal odds.
        given = np.zeros((n, items), bool)
        row, _ = np.nonzero(~noise[:, :-1])
        given[row, keys[:, :-1][~noise[:, :-1]]] = True
        order = np.argsort(~given, axis=1, kind="stable")
        pick = draws.integers(of_last[:, 1], 0, given.sum(1))
        keys[:, -1] = order[np.arange(n), pick]

        value = np.take_along_axis(values, keys, 1)
        ids = 2 * self.keys + draws.integers(of_ids.reshape(n, pairs, 2), 0, max(self.noise_vocab, 1))
        tokens = np.where(noise[..., None], ids, np.stack([keys, self.keys + value], -1)).reshape(n, length)
        before = self._last_given(keys, noise)
        distance = np.zeros((n, length), np.int64)
        distance[:, ::2] = np.where((before >= 0) & ~noise, 2 * (np.arange(pairs) - before), 0)
        return rows(tokens, np.where(distance > 0, np.roll(tokens, -1, axis=1), 0), distance)

    def chance(self, items: int) -> float:
        """Of a random value."""
        return 1 / self.keys

    def oracle(self, tokens: Int[np.ndarray, "n L"], items: int) -> Int[np.ndarray, "n L"]:
        """What followed the same token when it was last read at an even place."""
        found = np.zeros_like(tokens)
        for row, answers in zip(tokens, found):
            known: dict[int, int] = {}
            for place in range(0, len(row), 2):
                answers[place] = known.get(int(row[place]), 0)
                known[int(row[place])] = int(row[place + 1])
        return found

    def _last_given(self, keys: Int[np.ndarray, "n p"], noise: np.ndarray) -> Int[np.ndarray, "n p"]:
        """The pair before each at which its key was given last, -1 for none."""
        found = np.full_like(keys, -1)
        for key in range(self.keys):
            here = (keys == key) & ~noise
            number = np.where(here, np.arange(keys.shape[1]), -1)
            last = np.maximum.accumulate(number, axis=1)
            before = np.concatenate([np.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
            found = np.where(here, before, found)
        return found

"""Copying after a delay, and selective copying: the letters of a row are to be given again at its end.

Chance: 1 / letters. The oracle gives the letters in the order in which they stand. Evaluation strings are
never training strings (`tasks.recall.draws.set_apart`), where there are two letters or more.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import numpy as np
from jaxtyping import Float, Int

from tasks.recall import draws
from tasks.recall.types import Rows, rows

VARIANTS = ("classic", "selective", "mad", "mad_selective")


@dataclasses.dataclass
class CopyingSpec:
    """The law; a size is (L tokens, M letters).

    * "classic" (state-spaces/s4): M letters 1..V-2, zeros, then M times the marker V-1; the i-th marker is
      to be answered with the i-th letter. L = 120, M = V = 10 are the defaults there.
    * "selective": the letters stand scattered over the part before the markers, in random places. Mamba's
      (arXiv:2312.00752, section 4.1.1) has L = 4112, M = 16, V = 16.
    * "mad", "mad_selective" (MAD, arXiv:2403.17844): letters 0..V-3, blanks V-2, then once the marker V-1 and
      M blanks, which are to be answered. L = 256, M = V = 16. Each blank is put before a random letter, so
      that the last letter stands right before the marker, as in the authors' code.
    """

    variant: str = "selective"
    vocab_size: int = 16

    @property
    def _mad(self) -> bool:
        return self.variant.startswith("mad")

    @property
    def letters(self) -> int:
        """Number of ids that are to be copied."""
        return self.vocab_size - 2

    def fitted(self, length: int, items: int) -> tuple[int, int]:
        """With room for the letters twice."""
        return max(length, 2 * items + self._mad), items

    def check(self, length: int, items: int) -> None:
        """Raises ValueError: an unknown variant, too few ids, or too few tokens."""
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is unknown; use one of {', '.join(VARIANTS)}")
        if self.letters < 2:
            raise ValueError(f"vocab_size={self.vocab_size} leaves {self.letters} letters, at least 4 works")
        needed = self.fitted(0, items)[0]
        if items < 1 or length < needed:
            raise ValueError(f"{length} tokens have no room for {items} letters twice: {needed} would do")

    def width(self, length: int, items: int) -> int:
        """Letters, what sets strings apart, places."""
        return items + 1 + length - 2 * items - self._mad + items

    def make(self, u: Float[np.ndarray, "n w"], length: int, items: int, held_out: bool) -> Rows:
        """Rows; the distance is one more than from the token that is to be answered back to the letter."""
        body = length - items - self._mad
        of_letter, of_sum, of_place = draws.split(u, items, 1, body)
        letters = draws.integers(of_letter, 0, self.letters)
        if items > 1:
            last = np.full(len(u), items - 1)
            draws.set_apart(letters, last, of_sum[:, 0], self.letters, held_out)
        letters += 0 if self._mad else 1
        blank = self.vocab_size - 2 if self._mad else 0
        places = self._places(of_place, body, items)
        tokens = np.full((len(u), length), blank)
        np.put_along_axis(tokens, places, letters, 1)
        tokens[:, body : body + (1 if self._mad else items)] = self.vocab_size - 1
        targets, distance = np.zeros_like(tokens), np.zeros_like(tokens)
        asked = np.arange(length - items, length)
        targets[:, asked] = letters
        distance[:, asked] = asked + 1 - places
        return rows(tokens, targets, distance)

    def chance(self, items: int) -> float:
        """Of a random letter."""
        return 1 / self.letters

    def oracle(self, tokens: Int[np.ndarray, "n L"], items: int) -> Int[np.ndarray, "n L"]:
        """The letters in order, at the last places."""
        found = np.zeros_like(tokens)
        low, high = (0, self.letters) if self._mad else (1, self.letters + 1)
        for row, answers in zip(tokens, found):
            answers[-items:] = row[(low <= row) & (row < high)][:items]
        return found

    def _places(self, u: Float[np.ndarray, "n b"], body: int, items: int) -> Int[np.ndarray, "n m"]:
        """Where the letters stand, ascending."""
        if not self.variant.endswith("selective"):
            return np.broadcast_to(np.arange(items), (len(u), items))
        if not self._mad:
            return np.sort(draws.distinct(u[:, :items], body), axis=1)
        gap = draws.integers(u[:, : body - items], 0, items)  # of each blank: the letter after it
        blanks = (gap[:, None, :] <= np.arange(items)[None, :, None]).sum(-1)
        return np.arange(items) + blanks

"""Induction heads (Mamba, arXiv:2312.00752, section 4.1.2 and appendix E): what followed the special token?

Random tokens, among them once the special token, which comes again at the end: the answer is the token that
followed it. Published: vocabulary 16 and the special token, 256 tokens in training, 2^6 to 2^20 after it.

Chance: 1 / V. The oracle looks for the special token. There are no keys to set apart: training and
evaluation rows are drawn independently.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import numpy as np
from jaxtyping import Float, Int

from tasks.recall import draws
from tasks.recall.types import Rows, rows


@dataclasses.dataclass
class InductionSpec:
    """The law; a size is (T tokens, 1). ``tokens`` is V, and the special token has id V."""

    tokens: int = 16

    @property
    def vocab_size(self) -> int:
        """The special token included."""
        return self.tokens + 1

    def fitted(self, length: int, items: int) -> tuple[int, int]:
        """One item."""
        return max(length, 3), 1

    def check(self, length: int, items: int) -> None:
        """Raises ValueError: fewer tokens than special, follower, special."""
        if self.tokens < 2:
            raise ValueError(f"tokens={self.tokens} leaves nothing to tell apart; at least 2 works")
        if length < 3 or items != 1:
            raise ValueError(f"size ({length}, {items}) should be (at least 3, 1): one token is asked for")

    def width(self, length: int, items: int) -> int:
        """Tokens and a place."""
        return length + 1

    def make(self, u: Float[np.ndarray, "n w"], length: int, items: int, held_out: bool) -> Rows:
        """Rows; the distance is that between the two special tokens."""
        of_token, of_place = draws.split(u, length, 1)
        tokens = draws.integers(of_token, 0, self.tokens)
        place = draws.integers(of_place, 0, length - 2)
        np.put_along_axis(tokens, place, self.tokens, 1)
        tokens[:, -1] = self.tokens
        targets, distance = np.zeros_like(tokens), np.zeros_like(tokens)
        targets[:, -1:] = np.take_along_axis(tokens, place + 1, 1)
        distance[:, -1:] = length - 1 - place
        return rows(tokens, targets, distance)

    def chance(self, items: int) -> float:
        """Of a random token."""
        return 1 / self.tokens

    def oracle(self, tokens: Int[np.ndarray, "n L"], items: int) -> Int[np.ndarray, "n L"]:
        """The token after the first special one, everywhere."""
        first = np.argmax(tokens == self.tokens, axis=1)[:, None]
        return np.broadcast_to(np.take_along_axis(tokens, first + 1, 1), tokens.shape)

"""The contract of a generator of recall tasks, and what its rows hold."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

Rows = dict[str, np.ndarray]
"""Arrays [n, L]: ``tokens``, ``targets``, ``segment_ids``, ``positions`` int32 and ``weights`` float32 as in
`tasks.types.token_batch_spec`; and ``distance`` int32: where an answer is asked for at t, it stands in the
row at t + 1 - distance; 0 elsewhere."""


@runtime_checkable
class Generator(Protocol):
    """A law of rows of one size: L tokens with a number of items (pairs, letters, entries) to remember.

    A config dataclass; its fields hold for all sizes.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def fitted(self, length: int, items: int) -> tuple[int, int]:
        """The nearest size that makes sense: as long as it has to be, of as many items as can be."""

    def check(self, length: int, items: int) -> None:
        """Raises ValueError, naming field or size, unless such rows can be made."""

    def width(self, length: int, items: int) -> int:
        """How many uniform numbers a row is made of."""

    def make(self, u: Float[np.ndarray, "n w"], length: int, items: int, held_out: bool) -> Rows:
        """The rows that these uniform numbers stand for.

        Args:
            held_out: rows for evaluation.
        """

    def chance(self, items: int) -> float:
        """Accuracy of who knows the law and reads nothing."""

    def oracle(self, tokens: Int[np.ndarray, "n L"], items: int) -> Int[np.ndarray, "n L"]:
        """What is to be answered at every place where a question can end, found in the tokens alone."""


def rows(
    tokens: Int[np.ndarray, "n L"],
    targets: Int[np.ndarray, "n L"],
    distance: Int[np.ndarray, "n L"],
    *,
    weights: Bool[np.ndarray, "n L"] | None = None,
    segment_ids: Int[np.ndarray, "n L"] | None = None,
    positions: Int[np.ndarray, "n L"] | None = None,
) -> Rows:
    """Rows of one segment that learn what is asked, unless something else is said."""
    ids = np.ones_like(tokens) if segment_ids is None else segment_ids
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    fields = {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": ids,
        "positions": places,
        "distance": distance,
    }
    counted = distance > 0 if weights is None else weights
    return {name: array.astype(np.int32) for name, array in fields.items()} | {
        "weights": counted.astype(np.float32)
    }

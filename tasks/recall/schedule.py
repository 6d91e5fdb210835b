"""Which rows, of which size, a training step has: a pure function of the step."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

_KEPT = 4  # epochs whose order is kept


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A batch: ``size`` is its index, ``block`` counts the batches of that size in its epoch.

    ``era`` tells apart the epochs in which rows are new.
    """

    size: int
    block: int
    era: tuple[int, int]


class Schedule:
    """Epochs in which every size has its number of batches, in random order.

    Args:
        batches: of each size an epoch.
        starts: steps from which each size is trained on; () for all from the start.
        keep: sizes that have started stay.
    """

    def __init__(self, batches: Sequence[int], starts: Sequence[int], keep: bool, seed: int):
        self.batches, self.starts, self.keep, self.seed = tuple(batches), tuple(starts), keep, seed
        self._orders: dict[tuple[int, int], Int[np.ndarray, "n 2"]] = {}

    def at(self, step: int) -> Drawn:
        """What step ``step`` >= 0 has."""
        phase = bisect.bisect_right(self.starts, step) - 1 if self.starts else 0
        sizes = self._sizes(phase)
        epoch, inner = divmod(
            step - (self.starts[phase] if self.starts else 0), sum(self.batches[i] for i in sizes)
        )
        size, block = self._order(phase, epoch)[inner]
        return Drawn(int(size), int(block), (phase, epoch))

    @property
    def shares(self) -> list[float]:
        """Share of each size among the steps, of all mixed (without ``starts``)."""
        return [count / sum(self.batches) for count in self.batches]

    def _sizes(self, phase: int) -> list[int]:
        if not self.starts:
            return list(range(len(self.batches)))
        return list(range(phase + 1)) if self.keep else [phase]

    def _order(self, phase: int, epoch: int) -> Int[np.ndarray, "n 2"]:
        """(size, block) of each step of an epoch. Safe to call from several threads."""
        order = self._orders.get((phase, epoch))
        if order is None:
            pairs = [
                np.stack(np.meshgrid(i, np.arange(self.batches[i])), -1)[:, 0] for i in self._sizes(phase)
            ]
            rng = np.random.default_rng((self.seed, phase, epoch))
            order = rng.permutation(np.concatenate(pairs))
            for old in list(self._orders)[: -_KEPT + 1]:
                self._orders.pop(old, None)
            self._orders[phase, epoch] = order
        return order

"""Multi-query associative recall (MQAR; Arora et al. 2023, arXiv:2312.04927), and with keys that change.

``k1 v1 k2 v2 ... kK vK`` and then, at places that follow a power law, the keys once more, each of which is
to be answered with its value. The input after a question is not the answer but filler.

Chance: 2 / V for who reads nothing; 1 / K for who knows the row's values but not which is whose. The oracle
looks each token up among the pairs. Training and evaluation share the vocabulary, since a key has to have
been seen to be told apart; ``disjoint_pairs`` keeps the pairs of key and value apart.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

import numpy as np
from jaxtyping import Float, Int

from tasks.recall import draws
from tasks.recall.types import Rows, rows


@dataclasses.dataclass
class MQARSpec:
    """The law; a size is (T tokens, K pairs). The defaults are those of HazyResearch/zoology.

    Attributes:
        vocab_size: V. Id 0 fills; keys are 1..V/2 - 1, values V/2..V - 1.
        power_a: slot i = 1, 2, ... of the two-token slots after the pairs is chosen, without replacement,
            with weight i**(a - 1): near 0 most questions are near the pairs, at 1 they are anywhere.
        random_non_queries: what is not asked there is a random id (a key too, by accident), not 0.
        num_passes: how often the pairs are read (just read twice: arXiv:2407.05483).
        updates: this many keys are given once more, with another value; the last one counts.
        disjoint_pairs: a key and its value have ids of even distance in evaluation, of odd in training.
    """

    vocab_size: int = 8192
    power_a: float = 0.01
    random_non_queries: bool = True
    num_passes: int = 1
    updates: int = 0
    disjoint_pairs: bool = False

    def context(self, items: int) -> int:
        """Tokens of the pairs."""
        return 2 * (items * self.num_passes + self.updates)

    def fitted(self, length: int, items: int) -> tuple[int, int]:
        """Even, with room for the questions."""
        return max(length + length % 2, self.context(items) + 2 * items), items

    def check(self, length: int, items: int) -> None:
        """Raises ValueError: slots or ids do not suffice, or a field cannot work."""
        half = self.vocab_size // 2
        if self.power_a <= 0:
            raise ValueError(f"power_a={self.power_a} has no slots; it must be above 0, such as 0.01")
        if self.num_passes < 1 or items < 1:
            raise ValueError(f"num_passes={self.num_passes} and {items} pairs must be at least 1")
        if not 0 <= self.updates <= items:
            raise ValueError(f"updates={self.updates} must lie in 0..{items}, the number of pairs")
        if self.updates and (self.num_passes > 1 or self.disjoint_pairs):
            raise ValueError("updates needs num_passes=1 and disjoint_pairs=False")
        most = half // 2 - 1 if self.disjoint_pairs else half - 1
        if items > most:
            raise ValueError(
                f"vocab_size={self.vocab_size} has {most} keys for {items} pairs; raise it to at least "
                f"{2 * (items + 1) * (2 if self.disjoint_pairs else 1)}"
            )
        needed = self.fitted(0, items)[0]
        if length % 2 or length < needed:
            raise ValueError(
                f"{length} tokens have no room for {items} pairs and as many questions: an even number of "
                f"at least {needed} would"
            )

    def width(self, length: int, items: int) -> int:
        """Keys, values, slots, fillers, updates."""
        return 2 * items + self._slots(length, items) + length + 2 * self.updates

    def make(self, u: Float[np.ndarray, "n w"], length: int, items: int, held_out: bool) -> Rows:
        """Rows; the distance is that from a question to the key of the pair that answers it."""
        k, slots, context, half = items, self._slots(length, items), self.context(items), self.vocab_size // 2
        of_key, of_value, of_slot, of_filler, of_change, of_new = draws.split(
            u, k, k, slots, length, self.updates, self.updates
        )
        keys = 1 + draws.distinct(of_key, half - 1)
        if self.disjoint_pairs:
            parity = (keys + (0 if held_out else 1)) % 2
            values = half + half % 2 + 2 * draws.distinct(of_value, half // 2 - 1) + parity
        else:
            values = half + draws.distinct(of_value, self.vocab_size - half)
        pairs = np.stack([keys, values], axis=-1)
        told = np.broadcast_to(2 * (np.arange(k) + k * (self.num_passes - 1)), keys.shape).copy()
        tokens = np.zeros((len(u), length), np.int64)
        if self.random_non_queries:
            tokens = draws.integers(of_filler, 0, self.vocab_size)
        tokens[:, : 2 * k * self.num_passes] = np.tile(pairs.reshape(-1, 2 * k), self.num_passes)
        if self.updates:
            changed = draws.distinct(of_change, k)
            new = self._other(np.take_along_axis(values, changed, 1), of_new)
            np.put_along_axis(values, changed, new, 1)
            np.put_along_axis(told, changed, 2 * (k + np.arange(self.updates))[None], 1)
            again = np.stack([np.take_along_axis(keys, changed, 1), new], axis=-1)
            tokens[:, 2 * k : context] = again.reshape(len(u), -1)
        weights = np.arange(1, slots + 1) ** (self.power_a - 1)
        asked = context + 2 * draws.weighted_order(of_slot, weights, k)
        targets, distance = np.zeros_like(tokens), np.zeros_like(tokens)
        np.put_along_axis(tokens, asked, keys, 1)
        np.put_along_axis(targets, asked, values, 1)
        np.put_along_axis(distance, asked, asked - told, 1)
        return rows(tokens, targets, distance)

    def chance(self, items: int) -> float:
        """Of a random value."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def oracle(self, tokens: Int[np.ndarray, "n L"], items: int) -> Int[np.ndarray, "n L"]:
        """The value last told for each token, 0 for what is no key."""
        found, context = np.zeros_like(tokens), self.context(items)
        for key, value in zip(tokens[:, :context:2].T, tokens[:, 1:context:2].T):
            found = np.where(tokens == key[:, None], value[:, None], found)
        return found

    def _slots(self, length: int, items: int) -> int:
        return (length - self.context(items)) // 2

    def _other(self, values: Int[np.ndarray, "n c"], u: Float[np.ndarray, "n c"]) -> Int[np.ndarray, "n c"]:
        """Another value than each, uniform."""
        half, count = self.vocab_size // 2, self.vocab_size - self.vocab_size // 2
        return half + (values - half + draws.integers(u, 1, count)) % count


@dataclasses.dataclass(frozen=True)
class MQARSet:
    """Sizes (T, K) of a published experiment.

    Attributes:
        train, test: sizes.
        train_rows: examples of each size an epoch.
        starts: share of training after which each size is trained on in turn; () for all mixed.
        test_rows: of each size.
        epochs, batch: passes over the rows, and rows of a batch.
        rates: learning rates that were tried, ascending.
        random_non_queries: as in `MQARSpec`.
    """

    train: tuple[tuple[int, int], ...]
    test: tuple[tuple[int, int], ...]
    train_rows: tuple[int, ...]
    rates: tuple[float, ...]
    test_rows: int = 1000
    starts: tuple[float, ...] = ()
    epochs: int = 64
    batch: int = 256
    random_non_queries: bool = True


def _one(length: int, pairs: int, batch: int) -> MQARSet:
    """Zoology, figure 2: a run for each size, zeros between the questions."""
    size = ((length, pairs),)
    rates = (1e-4, 4.6e-4, 2.2e-3, 1e-2)
    return MQARSet(size, size, (100_000,), rates, 3000, batch=batch, random_non_queries=False)


def _growing(length: int) -> MQARSet:
    """Mamba-2, appendix D.1: K grows to T / 4 while training, 2^18 examples each."""
    sizes = tuple((length, length // share) for share in (32, 16, 8, 4))
    starts, batch = (0.0, 0.25, 0.5, 0.75), 2**18 // length
    rates = (3.2e-4, 3.2e-3, 1e-2)
    return MQARSet(sizes, sizes[-1:], (2**18,) * 4, rates, starts=starts, epochs=8, batch=batch)


_BASED = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
_BASED_ROWS = (100_000, 20_000, 20_000, 20_000, 20_000)
_LONG = ((512, 32), (512, 64), (512, 128), (1024, 64), (1024, 128), (1024, 256))

SETS: dict[str, MQARSet] = {
    "zoology_64": _one(64, 4, 512),
    "zoology_128": _one(128, 8, 512),
    "zoology_256": _one(256, 16, 256),
    "zoology_512": _one(512, 64, 128),
    "based": MQARSet(
        _BASED,
        ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)),
        _BASED_ROWS,
        (1e-3, 3.2e-3, 1e-2, 3.2e-2),
        epochs=32,
    ),
    "mamba2_256": _growing(256),
    "mamba2_512": _growing(512),
    "mamba2_1024": _growing(1024),
    "bottleneck": MQARSet(
        _BASED + _LONG,
        ((1024, 64), (1024, 128), (1024, 256)),
        _BASED_ROWS + (20_000,) * 6,
        (1e-3,),
        batch=128,
    ),
}
"""Published sets: Zoology (fig. 2), Based (arXiv:2402.18668, fig. 2), Mamba-2 (arXiv:2405.21060, D.1) and
SSM-Bottleneck (arXiv:2501.00658)."""

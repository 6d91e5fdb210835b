"""Planted dependencies: real text in which a fact stated early is needed late, at a chosen distance.

A fact is a line ``# the key of QZKD is 482913``; the same line stands again some bytes later, where a model
that remembers knows the six digits and one that does not pays log2(10) bits for each. Lines overwrite the
text, so that lengths and distances are exact. The digits of the second line are marked for the metrics.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

KEY, VALUE = 4, 6  # letters and digits
BEFORE, BETWEEN = b"\n# the key of ", b" is "
ANSWER_AT = len(BEFORE) + KEY + len(BETWEEN)  # of the first digit in the line
LINE = ANSWER_AT + VALUE + 1  # and a line end
CHANCE_BITS = math.log2(10)  # per answer byte


@dataclasses.dataclass
class PlantConfig:
    """What is planted into byte sources.

    Attributes:
        distances: bytes from a fact to where it is needed, line to line; empty plants nothing. Several are
            used in equal shares, and each has its own metrics.
        length: bytes of the documents, cut from the source's text laid end to end; 0 for twice the longest
            distance, at least 1024.
        facts: in a document; as many as fit without overlap are planted, at most this.
        seed: of places, keys and values.
    """

    distances: tuple[int, ...] = ()
    length: int = 0
    facts: int = 4
    seed: int = 0

    @property
    def document_length(self) -> int:
        """``length``, or twice the farthest distance and at least 1024."""
        return self.length or max(1024, 2 * max(self.distances, default=0))

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        if len(self.distances) > 255:
            raise ValueError(f"task.plant.distances has {len(self.distances)} entries, at most 255 work")
        for distance in self.distances:
            if not LINE <= distance <= self.document_length - LINE:
                raise ValueError(
                    f"task.plant.distances has {distance}; with documents of task.plant.length="
                    f"{self.document_length} bytes and lines of {LINE} it must be {LINE}.."
                    f"{self.document_length - LINE}"
                )
        if self.distances and self.facts < 1:
            raise ValueError(f"task.plant.facts={self.facts} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Planted:
    """A document. ``marks`` is 0 but at answer bytes, where it is 1 + the index of the distance."""

    text: bytes
    marks: UInt8[np.ndarray, " n"]


def plant(documents: Sequence[bytes], config: PlantConfig, side: int) -> list[Planted]:
    """The text of ``documents`` end to end, cut into equal documents, with facts in each.

    A pure function of its arguments. A remainder shorter than a document is left over.

    Args:
        side: 0 for training, 1 for validation: their keys and values are drawn apart.

    Raises:
        ValueError: the config cannot work, or the text is shorter than one document.
    """
    config.validate()
    text, length = b"\n".join(documents), config.document_length
    if len(text) < length:
        raise ValueError(
            f"task.plant: the {('training', 'validation')[side]} text has {len(text)} bytes, fewer than one "
            f"document of {length} (task.plant.length); use a longer source or shorter distances"
        )
    pieces = np.frombuffer(text, np.uint8)[: len(text) // length * length].reshape(-1, length)
    return [_plant_one(piece, config, (config.seed, side, i)) for i, piece in enumerate(pieces)]


def _plant_one(piece: UInt8[np.ndarray, " n"], config: PlantConfig, seed: tuple[int, ...]) -> Planted:
    rng = np.random.default_rng(seed)
    text, marks = piece.copy(), np.zeros(len(piece), np.uint8)
    taken: list[int] = []
    # Every distance comes first in its share of the documents, so that long ones find room too.
    kinds = (np.arange(config.facts) + seed[-1]) % len(config.distances)
    for kind in kinds:
        distance = config.distances[kind]
        for _ in range(20):
            start = int(rng.integers(len(text) - distance - LINE + 1))
            if all(abs(place - other) >= LINE for place in (start, start + distance) for other in taken):
                _write(text, marks, start, distance, int(kind) + 1, rng)
                taken += [start, start + distance]
                break
    return Planted(text.tobytes(), marks)


def _write(
    text: UInt8[np.ndarray, " n"],
    marks: UInt8[np.ndarray, " n"],
    start: int,
    distance: int,
    mark: int,
    rng: np.random.Generator,
) -> None:
    key = rng.integers(ord("A"), ord("Z") + 1, KEY, dtype=np.uint8).tobytes()
    value = rng.integers(ord("0"), ord("9") + 1, VALUE, dtype=np.uint8).tobytes()
    line = np.frombuffer(BEFORE + key + BETWEEN + value + b"\n", np.uint8)
    for place in (start, start + distance):
        text[place : place + LINE] = line
    answer = start + distance + ANSWER_AT
    marks[answer : answer + VALUE] = mark

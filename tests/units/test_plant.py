"""Planted facts: exact distances, marked answers, nothing shared between the sides, errors."""

import re

import numpy as np
import pytest

from tasks.plant import LINE, VALUE, PlantConfig, plant

TEXT = [bytes(b"abcdefghij klmnop\n"[(i * j) % 18] for j in range(3000)) for i in range(1, 12)]
FACT = re.compile(rb"\n# the key of ([A-Z]{4}) is (\d{6})\n")


def facts(document):
    return [(m.start(), m[1], m[2], m.start(2)) for m in FACT.finditer(document.text)]


def test_every_fact_is_needed_again_at_its_distance():
    config = PlantConfig(distances=(200, 700), length=2048, facts=4)
    documents = plant(TEXT, config, 0)
    assert len(documents) == sum(map(len, TEXT)) // 2048
    counts = {200: 0, 700: 0}
    for document in documents:
        assert len(document.text) == len(document.marks) == 2048
        found = facts(document)
        by_key = {}
        for start, key, value, _ in found:
            by_key.setdefault((key, value), []).append(start)
        for first, second in by_key.values():
            counts[second - first] += 1
            answer = np.flatnonzero(document.marks)
            digits = next(at for start, *_, at in found if start == second)
            assert set(range(digits, digits + VALUE)) <= set(answer.tolist())
            assert (document.marks[digits : digits + VALUE] == (1 if second - first == 200 else 2)).all()
        assert (document.marks > 0).sum() == VALUE * len(by_key)
    assert min(counts.values()) >= len(documents)  # four facts a document, two distances, some without room


def test_planting_is_repeatable_and_apart_on_the_two_sides():
    config = PlantConfig(distances=(300,), length=1024, facts=2)
    one, two, other = (plant(TEXT, config, side) for side in (0, 0, 1))
    assert [d.text for d in one] == [d.text for d in two]
    keys = [{key for d in documents for _, key, *_ in facts(d)} for documents in (one, other)]
    assert keys[0] and keys[1] and not keys[0] & keys[1]


def test_text_between_the_lines_is_the_source():
    (document,) = plant([b"x" * 1500], PlantConfig(distances=(500,), length=1024, facts=1), 0)
    assert FACT.sub(b"", document.text) == b"x" * (1024 - 2 * LINE)
    assert len(plant([b"x" * 1500], PlantConfig(distances=(100,)), 0)[0].text) == 1024


@pytest.mark.parametrize(
    "given, message",
    [
        ({"distances": (5,)}, r"task.plant.distances has 5; .* must be 29\.\.995"),
        ({"distances": (3000,), "length": 2000}, r"has 3000; with documents of task.plant.length=2000"),
        ({"distances": (100,), "facts": 0}, "task.plant.facts=0"),
        ({"distances": (100_000,)}, r"the training text has 33010 bytes, fewer than one document of 200000"),
    ],
)
def test_impossible_plants_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        plant(TEXT, PlantConfig(**given), 0)

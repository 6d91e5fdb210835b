"""Planted facts: exact distances, marked answers, nothing shared between the sides, errors."""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tasks.lm import LMTask, LMTaskConfig
from tasks.plant import CHANCE_BITS, LINE, VALUE, PlantConfig, plant

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


def test_a_task_on_planted_text_measures_each_distance(tmp_path):
    """The marks reach the metrics with the digits under them, in training and in validation batches."""
    for i, text in enumerate(TEXT):
        (tmp_path / f"{i}.txt").write_bytes(text)
    config = LMTaskConfig(source=str(tmp_path), seq_len=128, batch_size=4, cache_dir=str(tmp_path / "cache"))
    config.plant = PlantConfig(distances=(200, 400), length=1024)
    for packing in ("docs", "buckets"):
        task = LMTask(dataclasses.replace(config, packing=packing))
        for data in (task.train(), task.eval_sets()["validation"]):
            counts = np.zeros(2)
            for step in range(6):
                batch = data[step]
                marked = batch["targets"][batch["marks"] > 0]
                assert ((marked >= ord("0")) & (marked <= ord("9"))).all()
                nll = jnp.where(jnp.asarray(batch["marks"]) > 0, CHANCE_BITS * math.log(2), 0.1)
                metrics = task.metrics({"nll": nll}, batch)
                for i, distance in enumerate((200, 400)):
                    bits, count = metrics[f"answer_bits_{distance}"]
                    np.testing.assert_allclose(bits, CHANCE_BITS * count, rtol=1e-5)
                    counts[i] += count
            assert (counts > 0).all()


def test_only_bytes_can_be_planted_into(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(1000, dtype=np.uint16))
    config = LMTaskConfig(source=str(tmp_path), vocab_size=1000, plant=PlantConfig(distances=(200,)))
    with pytest.raises(ValueError, match="facts are planted into bytes, but .* holds tokens"):
        LMTask(config)

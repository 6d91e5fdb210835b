"""Tasks that are asked in text at several lengths: their samples, and how well a run answers them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.opened import OpenRun
from eval.probes.answers import lengths_of, noise_of, read, tokenizer_of
from eval.probes.types import Curve, NotApplicable, Say
from tasks.haystack import GENERATORS
from tasks.haystack.config import NOISES
from tasks.haystack.types import Request, Sample, TooShort

Score = Callable[[str, tuple[str, ...]], float]  # of what was said, given the references


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked: ``new_tokens`` of each task by name, and the settings of the probe."""

    new_tokens: Mapping[str, int]
    factors: tuple[float, ...]
    samples: int
    noise: str
    rows: int
    seed: int


def check(probe: str, asked: Asked, known: Sequence[str]) -> None:
    """Raises ValueError naming the first setting that cannot work."""
    checks = {
        "tasks": (asked.new_tokens and set(asked.new_tokens) <= set(known), f"some of {', '.join(known)}"),
        "factors": (asked.factors and min(asked.factors) > 0, "positive, and at least one"),
        "samples": (asked.samples >= 1, "at least 1"),
        "noise": (asked.noise in NOISES, f"one of {', '.join(NOISES)}"),
        "rows": (asked.rows >= 1, "at least 1"),
    }
    for field, (fits, wanted) in checks.items():
        if not fits:
            given = list(asked.new_tokens) if field == "tasks" else getattr(asked, field)
            raise ValueError(f"{probe}.{field}={given!r} should be {wanted}")


def measure(opened: OpenRun, asked: Asked, score: Score, say: Say) -> dict[str, Any]:
    """Numbers of every task by length: its score, and the share of answer tokens that are the most likely.

    Raises NotApplicable for a run without a tokenizer, or where nothing fits.
    """
    tokenizer = tokenizer_of(opened)
    lengths, left_out = lengths_of(opened, asked.factors)
    made: dict[tuple[str, str], list[Sample]] = {}
    for task in asked.new_tokens:
        for name, length in lengths.items():
            try:
                made[task, name] = _samples(opened, asked, task, length)
            except TooShort as short:
                left_out[f"{task} {name}"] = str(short)
    for name, reason in left_out.items():
        say(f"{name} left out: {reason}")
    if not made:
        raise NotApplicable(f"no prompt fits: {'; '.join(left_out.values())}")
    samples = [sample for some in made.values() for sample in some]
    new_tokens = max(asked.new_tokens[task] for task, _ in made)
    readings = iter(read(opened, samples, say, rows=asked.rows, new_tokens=new_tokens))
    scores: dict[str, dict[str, float]] = {}
    given: dict[str, dict[str, float]] = {}
    for (task, name), some in made.items():
        pairs = [(next(readings), sample) for sample in some]
        said = [(r.text(tokenizer, asked.new_tokens[task]), sample.references) for r, sample in pairs]
        right = np.concatenate([r.predicted[:-1] == sample.answer for r, sample in pairs])
        scores.setdefault(task, {})[name] = float(np.mean([score(*one) for one in said]))
        given.setdefault(task, {})[name] = float(right.mean())
    return {
        "training_length": opened.config.task.seq_len,
        "lengths": lengths,
        "left_out": left_out,
        "prompts": len(samples),
        "score": scores,
        "tokens_right": given,
    }


def means(by_task: Mapping[str, Mapping[str, float]], lengths: Mapping[str, int]) -> dict[str, float]:
    """Over the tasks that fit into each length."""
    found = {name: [of[name] for of in by_task.values() if name in of] for name in lengths}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def curves(numbers: Mapping[str, Any]) -> dict[str, Curve]:
    """The score of each task by prompt length."""
    return {
        task: Curve([numbers["lengths"][name] for name in of], list(of.values()), "prompt length", "score")
        for task, of in numbers["score"].items()
    }


def _samples(opened: OpenRun, asked: Asked, task: str, length: int) -> list[Sample]:
    tokenizer, noise = tokenizer_of(opened), noise_of(opened, asked.noise)

    def make(i: int) -> Sample:
        rng = np.random.default_rng((asked.seed, length, i))
        return GENERATORS[task](Request(rng, tokenizer, length, noise=noise))

    return [make(i) for i in range(asked.samples)]

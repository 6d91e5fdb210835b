"""Mean metrics of a model on held-out sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tasks.types import combine_means

EvalStep = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


def evaluate(eval_step: EvalStep, params: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Weighted mean of every metric over ``batches``; results are fetched only after all are dispatched."""
    return combine_means([eval_step(params, batch) for batch in batches])

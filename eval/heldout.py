"""Mean metrics of a model on the held-out sets of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from models.functional import Functional
from models.loss import token_nll
from runtime.feed import Feed, local_rows
from tasks.lm import LMTask
from tasks.types import Mean, combine_means

EvalStep = Callable[[Any, Mapping[str, Any]], dict[str, Mean]]


def make_eval_step(model: Functional, task: LMTask) -> EvalStep:
    """The jitted ``(params, batch) -> {metric: (sum, weight)}``, from an empty state."""

    def step(params: Any, batch: Mapping[str, Any]) -> dict[str, Mean]:
        lm = model.bind(params)
        nll, _, _ = token_nll(lm, batch, chunks=lm.config.loss_chunks)
        return task.metrics({"nll": nll}, batch)

    return jax.jit(step)


def evaluate(eval_step: EvalStep, params: Any, task: LMTask, sharding: NamedSharding) -> dict[str, float]:
    """Weighted mean of every metric over every held-out set, as ``{"validation/loss": ...}``.

    Args:
        sharding: of an array [B, L]; every process loads its own rows.

    Raises:
        DataError: a batch could not be loaded.
    """
    size, results = task.eval_shape[0], dict[str, float]()
    for name, data in task.eval_sets(local_rows(sharding, size)).items():
        with Feed(data, sharding, size, end_step=len(data)) as feed:
            # Nothing is fetched before everything is dispatched.
            means = combine_means([eval_step(params, batch) for _, batch in feed])
        results |= {f"{name}/{metric}": value for metric, value in means.items()}
    return results

"""What a finished run leaves behind besides its checkpoint: results, a curve, a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from configs.base import BaseExperiment
from eval import classified, curves, language, recalled, report
from models.functional import Functional
from objectives.types import Objective
from runtime.host import peak_memory

MORE: dict[str, Callable[..., tuple[dict[str, Any], dict[str, Any]]]] = {
    "lm": language.more,
    "classification": classified.more,
    "hmt": language.more,
    "beacon": language.more,
    "recall": recalled.more,
}
"""By kind of experiment: further results, and how `eval.curves.plot_loss` is to show the run."""


def finish(
    model: Functional,
    objective: Objective,
    config: BaseExperiment,
    params: Any,
    results: Mapping[str, Any],
    workdir: epath.Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """``results`` with peak memory and what the kind of experiment adds.

    Written to result.json, loss.png, report.html, and sample.txt of a language model that is to sample.
    """
    # Before anything that may need more memory than the training did.
    results = dict(results) | {f"memory/{name}_peak_bytes": size for name, size in peak_memory().items()}
    added, shown = MORE[config.kind](model, objective.task, config, params, results, workdir, say)
    results |= added
    if jax.process_index() == 0:
        records = curves.read_records(workdir / "metrics.jsonl")
        curves.plot_loss(records, workdir / "loss.png", **shown)
        (workdir / "result.json").write_text(json.dumps(results, indent=2) + "\n")
        say(f"report {report.write([workdir])}, curve {workdir / 'loss.png'}, {workdir / 'result.json'}")
    return results

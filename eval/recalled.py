"""What a finished recall run shows: accuracy of answers beside chance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from configs.recall import RecallExperiment
from models.functional import Functional
from tasks.recall import RecallTask


def more(
    model: Functional,
    task: RecallTask,
    config: RecallExperiment,
    params: Any,
    results: Mapping[str, Any],
    workdir: epath.Path,
    say: Callable[[str], None],
) -> tuple[dict[str, float], dict[str, Any]]:
    """``reference/chance``, the accuracy of who reads nothing, as a result and as a line of the curve."""
    sizes = task.chance()
    chance = sum(sizes.values()) / len(sizes)
    say(f"accuracy of answers {results['validation/accuracy']:.4f}, chance {chance:.4f}")
    references = {"reference/chance": chance}
    return references, {"unit": "nats per target", "accuracy": {"chance": chance}}

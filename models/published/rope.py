"""Rotary positions of a Hugging Face config, in its newer and older spelling, to ``RopeConfig`` and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layers.rope import RopeConfig

TRAINED = "original_max_position_embeddings"
# Published kind to ours, and its options: published name to field.
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "default": ("none", {}),
    "linear": ("linear", {"factor": "factor"}),
    "yarn": (
        "yarn",
        {
            "factor": "factor",
            TRAINED: "original_max_position",
            "beta_fast": "beta_fast",
            "beta_slow": "beta_slow",
            "attention_factor": "attention_factor",
        },
    ),
    "llama3": (
        "llama3",
        {
            "factor": "factor",
            TRAINED: "original_max_position",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
        },
    ),
}
READ = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def rope_from(given: Mapping[str, Any], max_positions: int | None) -> dict[str, Any]:
    """Fields ``attention.rope...`` from published fields.

    Args:
        given: has ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``.
        max_positions: the trained length where the options do not name it.

    Raises:
        ValueError: a kind or an option that is not supported; names it, and those that are.
    """
    options = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    kind = options.get("rope_type", options.get("type", "default"))
    if kind not in KINDS:
        raise ValueError(f"published config: rope_type={kind!r} is not supported; known are {sorted(KINDS)}")
    scaling, fields = KINDS[kind]
    unknown = {name for name, value in options.items() if value is not None} - READ - set(fields)
    if TRAINED not in fields:  # written beside kinds that do not use it
        unknown.discard(TRAINED)
    if unknown or options.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"published config: rope of type {kind!r} with {options} is not supported; known options are "
            f"{sorted(fields)}"
        )
    found: dict[str, Any] = {"scaling": scaling}
    found["theta"] = options.get("rope_theta") or given.get("rope_theta") or 10_000.0
    if TRAINED in fields:
        options[TRAINED] = options.get(TRAINED) or max_positions
    found |= {ours: options[name] for name, ours in fields.items() if options.get(name) is not None}
    return {f"attention.rope.{name}": value for name, value in found.items()}


def rope_to(config: RopeConfig) -> dict[str, Any]:
    """Published fields ``rope_parameters...``; the inverse of :func:`rope_from`."""
    for kind, (scaling, fields) in KINDS.items():
        if scaling == config.scaling:
            options = {name: getattr(config, ours) for name, ours in fields.items()}
            options = {"rope_type": kind, "rope_theta": config.theta, **options}
            return {f"rope_parameters.{n}": value for n, value in options.items() if value is not None}
    known = sorted(scaling for scaling, _ in KINDS.values())
    raise ValueError(
        f"model.attention.rope.scaling={config.scaling!r} cannot be published; known are {known}"
    )

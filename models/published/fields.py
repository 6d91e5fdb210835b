"""Published config files to ``LMConfig``, by a table of field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from models.config import LMConfig


@dataclasses.dataclass(frozen=True)
class Fields:
    """The config of a checkpoint format. Fields of nested objects are dotted on both sides.

    Attributes:
        ours: published field to the field or fields of ``LMConfig`` that take its value.
        implied: fields of ``LMConfig`` that the architecture fixes.
        derived: further fields of ``LMConfig`` (the pattern at least), computed from all published fields.
        published: further published fields, computed from an ``LMConfig`` whose defaults are written out; the
            inverse of ``derived``. None for a format that is only read.
        blank: the config to fill in.
        fixed: published fields we can only run with this value; a missing field has it.
        defaults: values of missing fields. Every other field of ``ours`` must be there.
        aliases: other published names of a field.
    """

    ours: Mapping[str, str | tuple[str, ...]]
    derived: Callable[[Mapping[str, Any]], dict[str, Any]]
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    published: Callable[[Any], dict[str, Any]] | None = None
    blank: Callable[[], LMConfig] = LMConfig


def config_from_fields(raw: Mapping[str, Any], fields: Fields) -> LMConfig:
    """The ``LMConfig`` of a published config (the parsed JSON).

    Raises:
        ValueError: a field is missing, or asks for what this code cannot compute; all such fields are named.
    """
    given = {fields.aliases.get(name, name): value for name, value in _flatten(raw).items()}
    given = {**fields.defaults, **given}
    problems = [f"{name} is missing" for name in fields.ours if name not in given]
    problems += [
        f"{name}={given[name]!r} is not supported, only {only!r}"
        for name, only in fields.fixed.items()
        if given.get(name, only) != only
    ]
    if problems:
        raise ValueError("published config: " + "; ".join(problems))
    config = fields.blank()
    for name, value in fields.implied.items():
        _set(config, name, value)
    for name, targets in fields.ours.items():
        for target in (targets,) if isinstance(targets, str) else targets:
            _set(config, target, given[name])
    for name, value in fields.derived(given).items():
        _set(config, name, value)
    config.validate()
    return config


def require(given: Mapping[str, Any], *names: str) -> list[Any]:
    """Values of published fields. Raises ValueError naming the first that is missing."""
    for name in names:
        if given.get(name) is None:
            raise ValueError(f"published config: {name} is missing")
    return [given[name] for name in names]


def _set(config: Any, dotted: str, value: Any) -> None:
    *parents, name = dotted.split(".")
    for parent in parents:
        config = getattr(config, parent)
    if not hasattr(config, name):
        raise AttributeError(f"{type(config).__name__} has no field {name!r}")
    setattr(config, name, value)


def _flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields of nested objects under dotted names, beside the objects themselves."""
    flat: dict[str, Any] = {}
    for name, value in raw.items():
        flat[prefix + name] = value = _plain(value)
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
    return flat


def _plain(value: Any) -> Any:
    """Lists as tuples, and infinity from the tagged form it is written in, since JSON has none."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return tuple(_plain(v) for v in value) if isinstance(value, (list, tuple)) else value

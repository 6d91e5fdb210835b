"""An experiment read back from the JSON that a run keeps of it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from configs.base import BaseExperiment, ConfigError, Experiment
from configs.beacon import BeaconExperiment
from configs.classification import ClassificationExperiment
from configs.hmt import HMTExperiment
from configs.overrides import fields
from configs.recall import RecallExperiment

KINDS: dict[str, type[BaseExperiment]] = {
    kind.kind: kind
    for kind in (Experiment, ClassificationExperiment, HMTExperiment, BeaconExperiment, RecallExperiment)
}


def from_json(text: str, where: str = "config.json") -> Any:
    """The experiment of which ``BaseExperiment.to_json`` gave ``text``; fields it lacks have their defaults.

    Raises:
        ConfigError: not JSON, or a field that does not exist or has another type; names it and ``where``.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    kind = tree.pop("kind", Experiment.kind) if isinstance(tree, dict) else Experiment.kind
    if kind not in KINDS:
        raise ConfigError(f"{where}: kind is {kind!r}, expected one of {sorted(KINDS)}")
    return _read(KINDS[kind], tree, where, "")


def overridden(config: Any, settings: Sequence[str]) -> Any:
    """``config`` with ``settings`` such as "model.memory.recall=none"; values are JSON, or plain words.

    Raises:
        ConfigError: a field that does not exist (names the nearest), or a value of another type.
    """
    tree = json.loads(config.to_json())
    for setting in settings:
        path, equals, text = setting.partition("=")
        *above, last = path.split(".")
        node = tree
        for name in above:
            node = node.get(name) if isinstance(node, dict) else None
        if not equals or not isinstance(node, dict) or last not in node:
            nearest = difflib.get_close_matches(path, fields(config), 1, 0.0)
            raise ConfigError(f"{setting!r} should be FIELD=VALUE of a field there is, such as {nearest[0]}")
        try:
            node[last] = json.loads(text)
        except ValueError:
            node[last] = text
    return from_json(json.dumps(tree), ", ".join(settings))


def _read(kind: Any, value: Any, where: str, name: str) -> Any:
    """``value`` of JSON as the type ``kind`` of the field ``name``."""
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, where, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (a for a in arguments if a is not type(None))
        return _read(kind, value, where, name)
    if origin is tuple and isinstance(value, list):
        inner = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        if len(inner) == len(value):
            return tuple(_read(k, v, where, f"{name}[{i}]") for i, (k, v) in enumerate(zip(inner, value)))
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], v, where, f"{name}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _read(arguments[1], v, where, f"{name}.{key}") for key, v in value.items()}
    if kind is Any or (type(value) is kind and kind in (int, str, bool, float)):
        return value
    if kind is float and type(value) in (int, str):  # infinities are written as strings
        with contextlib.suppress(ValueError):
            return float(value)
    raise ConfigError(f"{where}: {name} is {value!r}, expected {getattr(kind, '__name__', kind)}")


def _read_fields(kind: Any, tree: Any, where: str, name: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: {name or 'the file'} is {tree!r}, expected fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for key, value in tree.items():
        path = f"{name}.{key}" if name else key
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, 0.0)
            raise ConfigError(
                f"{where}: there is no field {path!r}; the nearest is {nearest[0]!r}. Was the run made by "
                "another version?"
            )
        values[key] = _read(hints[key], value, where, path)
    return kind(**values)

"""Command-line overrides (``--config.model.d_model=512``) checked before they are applied."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any


def load(spec: str) -> Any:
    """The experiment of ``PATH[:ARG]``: calls ``get_config(ARG)`` (or ``get_config()``) of that file.

    Raises:
        FileNotFoundError: there is no such file; the message lists the configs beside it.
    """
    module, arg = module_of("config", spec)
    return module.get_config(arg) if arg else module.get_config()


def module_of(flag: str, spec: str) -> tuple[ModuleType, str]:
    """The module at PATH of ``--flag=PATH[:ARG]``, and ARG. Raises FileNotFoundError, which lists others."""
    path, _, arg = spec.partition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        there = sorted(str(p) for p in file.parent.glob("[!_]*.py")) if file.parent.is_dir() else []
        raise FileNotFoundError(
            f"--{flag}={spec}: no file {path}" + (f"; there are {', '.join(there)}" if there else "")
        )
    module_spec = importlib.util.spec_from_file_location(f"_{flag}", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module, arg


def fields(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of every leaf field of a tree of dataclasses."""
    names = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        names += fields(value, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return names


def check(argv: Sequence[str], flag: str = "config") -> None:
    """Refuse overrides of fields that do not exist, and arguments that the config refuses.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names the unknown field and the nearest that exists; or is the config's own, if that names
            its file. (Any other error of a config is left to the parser of the flag, which tells where.)
    """
    spec = next((a.partition("=")[2] for a in argv if a.lstrip("-").startswith(f"{flag}=")), None)
    if spec is None:
        return
    try:
        known = fields(load(spec))
    except ValueError as error:
        if pathlib.Path(spec.partition(":")[0]).name in str(error):
            raise
        return
    for arg in argv:
        name = arg.lstrip("-").partition("=")[0]
        if not arg.startswith("-") or not name.startswith(f"{flag}."):
            continue
        path = name.removeprefix(f"{flag}.")
        if path in known or any(k.startswith(path + ".") for k in known) or _entry(path, known):
            continue
        raise ValueError(f"--{name}: there is no field {path!r}; did you mean {_nearest(path, known)}?")


def _entry(path: str, known: Sequence[str]) -> bool:
    """Whether ``path`` reaches into a dict-valued field, such as optim.groups.<role>."""
    return any(path.startswith((k + ".", k + "[")) for k in known)


def _nearest(path: str, known: Sequence[str]) -> str:
    """The known names most like ``path``; the last part of the name counts more than where it stands."""

    def likeness(name: str) -> float:
        tail = difflib.SequenceMatcher(None, path.rsplit(".")[-1], name.rsplit(".")[-1]).ratio()
        return tail + 0.5 * difflib.SequenceMatcher(None, path, name).ratio()

    return " or ".join(sorted(known, key=likeness, reverse=True)[:2])

"""What a run was started with, and on what.

``config.json`` is the newest config; earlier ones, oldest first, ``config.1.json``, ``config.2.json``, ...
``environment.json`` lists the starts of the run, oldest first, with machine and versions.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from typing import Any

import jax
from etils import epath

NOTHING = object()
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def save_config(workdir: epath.PathLike, json_text: str) -> None:
    """Writes ``WORKDIR/config.json`` (on process 0); a different one already there is renamed, never lost.

    Raises:
        ValueError: ``json_text`` is not JSON.
    """
    json.loads(json_text)
    if jax.process_index():
        return
    root = epath.Path(workdir)
    root.mkdir(parents=True, exist_ok=True)
    old = load_config(workdir)
    if old == json_text:
        return
    if old is not None:
        n = 1
        while (root / f"config.{n}.json").exists():
            n += 1
        # A copy, not a rename: config.json must exist at every moment.
        (root / "config.json").copy(root / f"config.{n}.json")
    replace_text(root / "config.json", json_text)


def load_config(workdir: epath.PathLike) -> str | None:
    """Text of ``WORKDIR/config.json``, or None if the run has none."""
    path = epath.Path(workdir) / "config.json"
    return path.read_text() if path.exists() else None


def save_environment(workdir: epath.PathLike, step: int) -> None:
    """Adds this start, from ``step``, to ``WORKDIR/environment.json`` (process 0): date, machine, versions.

    A file that cannot be read is begun anew: it must not keep a run from going on.
    """
    if jax.process_index():
        return
    try:
        before = load_environment(workdir)
    except ValueError:
        before = []
    device = jax.devices()[0]
    start = {
        "step": step,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    path = epath.Path(workdir) / "environment.json"
    replace_text(path, json.dumps([*before, start], indent=2) + "\n")


def load_environment(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The starts of the run, oldest first, as :func:`save_environment` wrote them, or none.

    Raises:
        ValueError: ``WORKDIR/environment.json`` is not a JSON list of objects.
    """
    path = epath.Path(workdir) / "environment.json"
    try:
        starts = json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
        raise ValueError(f"{path} should be a list of objects, one for each start of the run")
    return starts


def explain_config_change(old: str, new: str) -> list[str]:
    """One line for each field in which two configs (JSON) differ, such as ``optim.lr: 0.001 -> 0.0003``.

    Raises:
        ValueError: either text is not JSON.
    """
    before, after = config_fields(json.loads(old)), config_fields(json.loads(new))
    lines = []
    for name in sorted(before.keys() | after.keys()):
        a, b = before.get(name, NOTHING), after.get(name, NOTHING)
        if a is NOTHING:
            lines.append(f"{name}: added, {json.dumps(b)}")
        elif b is NOTHING:
            lines.append(f"{name}: removed, was {json.dumps(a)}")
        elif a != b or type(a) is not type(b):
            lines.append(f"{name}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a whole file; a reader, or a crash, sees either the old text or the new one."""
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


def config_fields(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a config's JSON by dotted name, such as "optim.lr"; a list of scalars is one leaf."""
    if isinstance(tree, dict) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, (dict, list)) for value in tree):
        items = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return {prefix: tree}
    fields: dict[str, Any] = {}
    for key, value in items:
        fields |= config_fields(value, f"{prefix}.{key}" if prefix else key)
    return fields

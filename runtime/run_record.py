"""The configs a run was started with: ``config.json`` is the newest; earlier ones, oldest first, are
``config.1.json``, ``config.2.json``, ..."""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath

NOTHING = object()


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


def explain_config_change(old: str, new: str) -> list[str]:
    """One line for each field in which two configs (JSON) differ, such as ``optim.lr: 0.001 -> 0.0003``.

    Raises:
        ValueError: either text is not JSON.
    """
    before, after = _fields(json.loads(old)), _fields(json.loads(new))
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


def _fields(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of the leaves; a list of scalars is one leaf."""
    if isinstance(tree, dict) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, (dict, list)) for value in tree):
        items = [(str(i), value) for i, value in enumerate(tree)]
    else:
        return {prefix: tree}
    fields: dict[str, Any] = {}
    for key, value in items:
        fields |= _fields(value, f"{prefix}.{key}" if prefix else key)
    return fields

"""Which parameters a run trains, by patterns on their paths; and trees split into what moves and the rest.

A frozen parameter has the role "frozen/<its role>": the optimizer keeps no state for it, and the train step
does not differentiate with respect to it.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from runtime.optimizer import FROZEN, parameter_path


def freeze(roles: PyTree, frozen: Sequence[str] = (), trained: Sequence[str] = ()) -> PyTree:
    """``roles`` with "frozen/" before those of the parameters that stay as they are.

    Adapters train unless a pattern of ``frozen`` matches them. Any other parameter that no pattern matches
    trains unless its role is frozen already or ``trained`` is given, which means: these and no others.

    Args:
        frozen, trained: glob patterns (``train.freeze``, ``train.unfreeze``) on paths as in parameters.txt;
            "*" crosses "/".

    Raises:
        ValueError: a pattern matches no parameter, or one parameter is matched on both sides.
    """
    leaves = jax.tree_util.tree_flatten_with_path(roles)[0]
    structure: Any = jax.tree.structure(roles)
    paths = [parameter_path(keys) for keys, _ in leaves]
    off, on = match(paths, frozen, "train.freeze"), match(paths, trained, "train.unfreeze")
    both = [path for path in paths if path in off and path in on]
    if both:
        raise ValueError(
            f"train.freeze={tuple(frozen)} and train.unfreeze={tuple(trained)} both match {_few(both)}; make "
            "one of the patterns narrower"
        )

    def role(path: str, role: str) -> str:
        plain = role.removeprefix(f"{FROZEN}/")
        closed = plain != role or (bool(trained) and not plain.startswith("adapter"))
        return f"{FROZEN}/{plain}" if path in off or (closed and path not in on) else plain

    return structure.unflatten([role(path, given) for path, (_, given) in zip(paths, leaves)])


def match(paths: Sequence[str], patterns: Sequence[str], field: str) -> set[str]:
    """The ``paths`` that any of ``patterns`` matches.

    Raises:
        ValueError: one of them matches none; names ``field`` and the nearest paths.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(paths, pattern)
        if not matched:
            nearest = difflib.get_close_matches(pattern, paths, 3, 0.0)
            raise ValueError(
                f"{field}: {pattern!r} matches no parameter; the nearest are {', '.join(nearest)} (all are "
                "in WORKDIR/parameters.txt; '*' crosses '/')"
            )
        found.update(matched)
    return found


def pick(tree: PyTree, trained: PyTree | None) -> PyTree:
    """``tree`` with an ``optax.MaskedNode``, which has no leaves, where ``trained`` (bools) is False.

    None means that everything is trained.
    """
    if trained is None:
        return tree
    return jax.tree.map(lambda moves, leaf: leaf if moves else optax.MaskedNode(), trained, tree)


def put_back(tree: PyTree, part: PyTree) -> PyTree:
    """``tree`` with the leaves that ``part``, of :func:`pick`, has."""
    return jax.tree.map(lambda leaf, new: leaf if isinstance(new, optax.MaskedNode) else new, tree, part)


def _few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")

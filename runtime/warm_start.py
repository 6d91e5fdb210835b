"""Parameters of another run's checkpoint, read into a fresh state: by path, straight into its sharding."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import difflib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from runtime import tree_diff
from runtime.checkpoint import CheckpointError
from runtime.freeze import match
from runtime.optimizer import parameter_path
from runtime.restore import SHOWN, ArchitectureError, brief, read

AVERAGE, PARAMS = "extras/ema", "params"  # where a checkpoint keeps its parameters
GROWING = ("vocab", "vocab_out", "positions")
"""Logical axes that may be longer here than in the source: what is added keeps its initialisation."""


@dataclasses.dataclass
class InitConfig:
    """What ``init_from`` reads; the rest keeps its initialisation.

    Attributes:
        include, exclude: glob patterns on parameter paths (as in the source's parameters.txt; "*" crosses
            "/"): those that any of ``include`` matches and none of ``exclude``.
        allow_missing: let parameters pass that only one of the two models has, or that differ in shape.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    allow_missing: bool = False


class Plan(NamedTuple):
    """Paths by what happens to them, and one line for each misfit."""

    load: list[str]
    grow: list[str]
    fresh: list[str]
    misfits: list[str]


def warm_start(
    params: dict[str, Any], axes: PyTree, checkpoint: epath.Path, config: InitConfig
) -> tuple[dict[str, Any], str]:
    """``params`` with what the checkpoint has of them (its moving average if there is one), and a summary.

    Args:
        params: freshly initialised arrays, whose shardings and dtypes the result has.
        axes: logical axis names of the parameters.
        checkpoint: directory of one checkpoint.

    Raises:
        ArchitectureError: names or shapes differ (unless ``config`` allows it); lists the first ones.
        ValueError: a pattern of ``config`` matches nothing.
        CheckpointError: the checkpoint cannot be read.
    """
    field, found = stored(checkpoint)
    fresh = tree_diff.leaves(params)
    structure: Any = jax.tree.structure(params)
    names = dict(zip(fresh, structure.flatten_up_to(axes)))
    plan = _plan(fresh, found, names, config)
    if plan.misfits and not config.allow_missing:
        raise ArchitectureError(_explain(checkpoint, plan.misfits))
    target = {
        path: jax.ShapeDtypeStruct(found[path].shape, leaf.dtype, sharding=_readable(leaf, found[path].shape))
        for path, leaf in fresh.items()
        if path in plan.load or path in plan.grow
    }
    loaded = _read(checkpoint, field, params, target)
    for path in plan.grow:
        loaded[path] = _grow(fresh[path], loaded[path])
    filled = structure.unflatten([loaded.get(path, leaf) for path, leaf in fresh.items()])
    return filled, _summary(plan, fresh, found, field)


def source_of(init_from: str) -> tuple[epath.Path, int | None]:
    """Workdir and step of "RUN" (None: the newest) or "RUN@STEP"."""
    run, at, step = init_from.rpartition("@")
    return (epath.Path(run), int(step)) if at and step.isdecimal() else (epath.Path(init_from), None)


def stored(checkpoint: epath.Path) -> tuple[str, dict[str, Any]]:
    """Which field of a checkpoint holds its parameters, and what they are (shape, dtype) by path.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(checkpoint).tree
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {brief(error)}") from error
    found = tree_diff.leaves(tree)
    field = AVERAGE if any(name.startswith(f"{AVERAGE}/") for name in found) else PARAMS
    prefix = f"{field}/"
    return field, {name.removeprefix(prefix): leaf for name, leaf in found.items() if name.startswith(prefix)}


def _plan(fresh: dict[str, Any], found: dict[str, Any], axes: dict[str, Any], config: InitConfig) -> Plan:
    known = [*fresh, *(path for path in found if path not in fresh)]
    chosen = match(known, config.include, "init.include") - match(known, config.exclude, "init.exclude")
    plan = Plan([], [], [path for path in fresh if path not in chosen], [])
    for path, leaf in fresh.items():
        if path not in chosen:
            continue
        if path not in found:
            others = [p for p in found if p not in fresh] or list(found)
            nearest = difflib.get_close_matches(path, others, 1, 0.0)
            plan.misfits.append(f"{path}: not in the source, whose nearest is {nearest[0]}")
        elif found[path].shape == leaf.shape:
            plan.load.append(path)
            continue
        elif _grows(found[path].shape, leaf.shape, axes[path]):
            plan.grow.append(path)
            continue
        else:
            plan.misfits.append(
                f"{path}: found {tree_diff.spell(found[path])}, expected {tree_diff.spell(leaf)}"
            )
        plan.fresh.append(path)
    for path in found:
        if path in chosen and path not in fresh:
            nearest = difflib.get_close_matches(path, list(fresh), 1, 0.0)
            plan.misfits.append(f"{path}: in the source only; the nearest here is {nearest[0]}")
    return plan


def _grows(old: tuple[int, ...], new: tuple[int, ...], axes: tuple[str | None, ...]) -> bool:
    """Whether ``new`` is ``old`` with more ids or positions."""
    return len(old) == len(new) and all(
        a == b or (a < b and name in GROWING) for a, b, name in zip(old, new, axes)
    )


def _explain(checkpoint: epath.Path, misfits: list[str]) -> str:
    shown = misfits[:SHOWN] + ([f"... and {len(misfits) - SHOWN} more"] if len(misfits) > SHOWN else [])
    return (
        f"init_from: the parameters of {checkpoint} do not fit this model:\n  "
        + "\n  ".join(shown)
        + "\nGive the model the shape of the source's config.json; or leave paths out with init.exclude, or "
        "all that do not fit with init.allow_missing=True. (Runs of repeated sub-layers are stacked on a "
        "leading axis, so another model.pattern may stack the same layers otherwise.)"
    )


def _readable(leaf: Any, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding of ``leaf`` for a source of ``shape``, replicated where it does not divide that."""
    try:
        leaf.sharding.shard_shape(shape)
        return leaf.sharding
    except ValueError:
        return NamedSharding(leaf.sharding.mesh, PartitionSpec())


def _read(
    checkpoint: epath.Path, field: str, params: dict[str, Any], target: dict[str, Any]
) -> dict[str, jax.Array]:
    """The arrays of ``target`` by path."""
    if not target:
        return {}
    tree: dict[Any, Any] = {}
    for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]:
        if parameter_path(keys) in target:
            node = tree
            for key in keys[:-1]:
                node = node.setdefault(key.key, {})
            node[keys[-1].key] = target[parameter_path(keys)]
    for name in reversed(field.split("/")):
        tree = {name: tree}
    try:
        loaded = tree_diff.leaves(read(checkpoint, tree, partial=True))
    except Exception as error:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {brief(error)}") from error
    return {name.removeprefix(f"{field}/"): array for name, array in loaded.items()}


def _grow(fresh: jax.Array, old: jax.Array) -> jax.Array:
    """``fresh`` with ``old`` in its first rows and columns."""
    write = jax.jit(
        lambda fresh, old: jax.lax.dynamic_update_slice(fresh, old, (0,) * fresh.ndim),
        out_shardings=fresh.sharding,
    )
    return write(fresh, old)


def _summary(plan: Plan, fresh: dict[str, Any], found: dict[str, Any], field: str) -> str:
    """One line: how many parameters were loaded, grown and fresh."""

    def count(paths: list[str]) -> str:
        return f"{sum(fresh[path].size for path in paths):,}"

    parts = [f"{count(plan.load)} parameters loaded" + (" (moving average)" if field == AVERAGE else "")]
    tables = ", ".join(
        f"{path} {tree_diff.spell(found[path])} -> {tree_diff.spell(fresh[path])}" for path in plan.grow
    )
    parts += [f"{count(plan.grow)} in tables that grew: {tables}"] if plan.grow else []
    few = ", ".join(plan.fresh[:SHOWN]) + (", ..." if len(plan.fresh) > SHOWN else "")
    parts += [f"{count(plan.fresh)} fresh: {few}"] if plan.fresh else ["none fresh"]
    unused = [line for line in plan.misfits if "in the source only" in line]
    return "; ".join(parts + ([f"{len(unused)} of the source not used"] if unused else []))

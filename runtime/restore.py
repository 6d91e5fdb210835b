"""Read one checkpoint directory onto the devices asked for, or say in words why it does not fit."""

from __future__ import annotations

import gc
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from runtime import tree_diff

PyTree = Any
SHOWN = 8  # differing leaves listed in an error message


class ArchitectureError(ValueError):
    """The checkpoint is sound but holds other arrays than the ones asked for."""


def placed(abstract: PyTree) -> PyTree:
    """ShapeDtypeStructs with shardings: the first local device for leaves that name none.

    Raises:
        ValueError: a sharding does not divide the array it is for.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or device
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)} cannot be sharded as asked: {error}") from error
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, abstract)


def try_restore(path: epath.Path, target: PyTree, partial: bool) -> tuple[PyTree, str]:
    """The tree and "", or None and why it cannot be read; raises ArchitectureError only."""
    hook = sys.unraisablehook
    try:
        return restore(path, target, partial), ""
    except ArchitectureError:
        raise
    except Exception as error:
        # A failed read abandons its sibling reads, each of which would print pages when collected.
        sys.unraisablehook = lambda _: None
        failure = brief(error)
    gc.collect()
    sys.unraisablehook = hook
    return None, failure


def restore(path: epath.Path, target: PyTree, partial: bool) -> PyTree:
    """The tree stored in ``path``, with the shardings of ``target``. No communication between processes.

    Args:
        target: as from :func:`placed`.
        partial: ``target`` names some of the top-level fields only, and floating point leaves are cast.

    Raises:
        ArchitectureError: names, shapes or dtypes differ.
        Exception: whatever orbax raises on files that are missing or damaged.
    """
    wanted = tree_diff.leaves(target)
    _check(path, tree_diff.leaves(ocp.PyTreeCheckpointHandler().metadata(path).tree), wanted, partial)
    return read(path, target, partial)


def read(path: epath.Path, target: PyTree, partial: bool) -> PyTree:
    """As :func:`restore`, of any leaves of the stored tree, whose names and shapes are known to be right."""
    arguments = jax.tree.map(
        lambda a: ocp.ArrayRestoreArgs(sharding=a.sharding, global_shape=a.shape, dtype=a.dtype), target
    )
    loaded = ocp.PyTreeCheckpointHandler().restore(
        path, args=ocp.args.PyTreeRestore(target, restore_args=arguments, partial_restore=partial)
    )
    wanted = tree_diff.leaves(target)
    # A lost array_metadatas/ file goes unnoticed by orbax: a PRNG key then comes back as plain integers.
    for name, leaf in tree_diff.leaves(loaded).items():
        want = wanted[name]
        if (leaf.shape, leaf.dtype) != (want.shape, want.dtype):
            raise ValueError(f"{name} was read as {tree_diff.spell(leaf)}, expected {tree_diff.spell(want)}")
    return loaded


def _check(path: epath.Path, found: dict[str, Any], wanted: dict[str, Any], partial: bool) -> None:
    """Raises ArchitectureError listing the first differing leaves."""
    if partial:
        fields = {_field(name) for name in wanted}
        found = {name: leaf for name, leaf in found.items() if _field(name) in fields}
    problems = tree_diff.differences(found, wanted, any_float=partial)
    if problems:
        shown = problems[:SHOWN]
        if len(problems) > SHOWN:
            shown.append(f"... and {len(problems) - SHOWN} more")
        raise ArchitectureError(
            f"checkpoint {path} does not fit this model and optimizer:\n  "
            + "\n  ".join(shown)
            + "\nUse the config it was saved with (config.json of its run), or train in another workdir"
        )


def _field(name: str) -> str:
    """Which part of a train state a leaf belongs to; the extras are parts of their own."""
    parts = name.split("/")
    return "/".join(parts[:2]) if parts[0] == "extras" else parts[0]


def brief(error: BaseException) -> str:
    """Type and first line: tensorstore appends its whole configuration."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text[:400]}"

"""How two pytrees of arrays differ, in words: paths, shapes and dtypes, no values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves that have a shape, by path ("params/blocks/0/kernel").

    Dataclass fields, dict keys and list indices look alike in a path, as they do in a checkpoint's metadata.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(map(_key, path)): leaf for path, leaf in flat if hasattr(leaf, "shape")}


def differences(found: dict[str, Any], wanted: dict[str, Any], *, any_float: bool = False) -> list[str]:
    """One line for each leaf whose presence, shape or dtype differs, in the order of ``wanted``.

    Args:
        found, wanted: as from :func:`leaves`. A typed PRNG key is compared as the integers it is stored as.
        any_float: floating point dtypes count as equal.
    """
    lines = []
    for name, leaf in wanted.items():
        leaf = _as_stored(leaf)
        if name not in found:
            lines.append(f"{name}: missing, expected {spell(leaf)}")
        elif found[name].shape != leaf.shape or not _same_dtype(found[name].dtype, leaf.dtype, any_float):
            lines.append(f"{name}: found {spell(found[name])}, expected {spell(leaf)}")
    for name, leaf in found.items():
        if name not in wanted:
            lines.append(f"{name}: found {spell(leaf)}, not expected")
    return lines


def spell(leaf: Any) -> str:
    """Dtype and shape, as ``float32[4,8]``."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _key(entry: Any) -> str:
    for attribute in ("name", "key", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _as_stored(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf


def _same_dtype(found: Any, wanted: Any, any_float: bool) -> bool:
    if any_float and jnp.issubdtype(wanted, jnp.floating):
        return bool(jnp.issubdtype(found, jnp.floating))
    return np.dtype(found) == np.dtype(wanted)

"""What switches on a trained model have been calibrated to: RUN/calibration.npz, by parameter.

Such values are parameters of the model they are switched on in, but of no checkpoint: ``eval.calibrate``
measures them on a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from layers.param import CALIBRATED

FILE = "calibration.npz"
Path = tuple[str | int, ...]


def name_of(path: Path) -> str:
    """Of a parameter in the file, such as "backbone/runs/0/layers/0/mixer/norm_cap", with LoRA or without."""
    return "/".join(map(str, path)).removeprefix("base/")


def calibrated_paths(roles: Any) -> set[Path]:
    """The parameters that no checkpoint has."""
    return {path for path, role in flatten_dict(roles).items() if role.endswith(CALIBRATED)}


def without(tree: Any, paths: set[Path]) -> Any:
    """The tree of parameters less those at ``paths``."""
    if not paths:
        return tree
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(tree).items() if path not in paths})


def completed(params: Any, abstract: Any, paths: set[Path], workdir: epath.Path) -> Any:
    """``params`` with those at ``paths`` as the run was calibrated, shaped and placed as in ``abstract``.

    Raises:
        ValueError: the run was not calibrated, or for another model.
    """
    if not paths:
        return params
    advice = f"measure it: python -m eval.calibrate --workdir={workdir}"
    values = load(workdir / FILE)
    if not values:
        raise ValueError(
            f"{workdir / FILE} does not exist, and {name_of(sorted(paths, key=str)[0])} is in no checkpoint; "
            + advice
        )
    flat, shapes = flatten_dict(params), flatten_dict(abstract)
    for path in paths:
        name, wanted = name_of(path), shapes[path]
        found = values.get(name)
        if found is None or found.shape != wanted.shape:
            there = "nothing" if found is None else f"shape {found.shape}"
            raise ValueError(f"{workdir / FILE}: {name} has {there}, expected shape {wanted.shape}; {advice}")
        flat[path] = jax.device_put(jnp.asarray(found, wanted.dtype), wanted.sharding)
    return unflatten_dict(flat)


def load(file: epath.Path) -> dict[str, np.ndarray]:
    """By name; empty where there is no file."""
    if not file.exists():
        return {}
    with file.open("rb") as stream, np.load(stream) as arrays:
        return dict(arrays)


def save(file: epath.Path, values: Mapping[str, np.ndarray]) -> None:
    """The whole file at once."""
    temporary = file.parent / f"{file.name}.tmp"
    with temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **values)
    temporary.replace(file)

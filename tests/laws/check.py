"""The laws on a mixer that is in no registry yet: from Python, while it is being written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import pytest
from flax import nnx

from models.registry import TINY_MIXERS
from runtime.mesh import MeshConfig, make_mesh
from tests.laws import cases, test_mixers

LAWS = [name.removeprefix("test_") for name in vars(test_mixers) if name.startswith("test_")]
NAME = "unregistered"


def check(build: Callable[[nnx.Rngs], Any], laws: Sequence[str] = LAWS) -> dict[str, str]:
    """Whether a mixer keeps the laws of `tests.laws.test_mixers`.

    Args:
        build: makes the mixer, of width ``models.registry.TINY_D_MODEL``.
        laws: some of :data:`LAWS`.

    Returns:
        By law and case: "" where it is kept, else what was found. Cases on meshes of more devices than there
        are say so.

    Raises:
        ValueError: a law that does not exist.
    """
    if unknown := set(laws) - set(LAWS):
        raise ValueError(f"there is no law {', '.join(sorted(unknown))}; there are {', '.join(LAWS)}")
    TINY_MIXERS[NAME] = build
    try:
        with jax.default_matmul_precision("highest"):
            return {
                " ".join([law, *map(str, case.values())]): _verdict(law, case)
                for law in laws
                for case in _cases(getattr(test_mixers, f"test_{law}"))
            }
    finally:
        del TINY_MIXERS[NAME]
        for cache in (cases.functional, cases.compiled, test_mixers.unsharded):
            cache.cache_clear()


def _cases(law: Callable) -> Iterator[dict[str, Any]]:
    """The arguments that pytest would give, but for the name and fixtures."""
    lists = []
    for mark in getattr(law, "pytestmark", []):
        names, values = mark.args[:2]
        names = [name.strip() for name in names.split(",")]
        lists.append([dict(zip(names, value if len(names) > 1 else (value,))) for value in values])
    for parts in itertools.product(*lists):
        yield {name: value for part in parts for name, value in part.items()}


def _verdict(law: str, case: dict[str, Any]) -> str:
    test, given = getattr(test_mixers, f"test_{law}"), dict(case)
    needed = math.prod(case.get("shape", ()))
    if needed > jax.device_count():
        return f"not tried: {needed} devices needed, there are {jax.device_count()}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = test.__code__.co_varnames[: test.__code__.co_argcount]
        given |= {"monkeypatch": monkeypatch} if "monkeypatch" in arguments else {}
        given |= {"mesh": _mesh} if "mesh" in arguments else {}
        try:
            test(NAME, **given)
        except Exception as error:  # whatever breaks it, the other laws can still be tried
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"{type(error).__name__}: {' '.join(said[:2])}"
    return ""


def _mesh(*shape: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])

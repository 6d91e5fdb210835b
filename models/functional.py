"""A module as functions over a plain nested dict of parameters, with axes and roles beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from layers.param import AXES

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Functional:
    """A module split into its static structure and descriptions of its parameters.

    Attributes:
        build: ``rngs -> module``.
        graphdef: the static structure, logical axes included.
        shapes: nested dict of ``jax.ShapeDtypeStruct``.
        axes: the same nested dict, of tuples of logical axis names ("layers" first where stacked).
        roles: the same nested dict, of roles.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any
    shapes: Tree
    axes: Tree
    roles: Tree

    @classmethod
    def create(cls, build: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
        """Describe ``build(rngs)`` without allocating anything, also where a mesh is in force."""
        no_mesh = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))
        with nnx.use_eager_sharding(False), no_mesh:  # axes are metadata here; the mesh comes later
            abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        graphdef, variables = nnx.split(abstract, nnx.Param)
        return cls(
            build=build,
            graphdef=graphdef,
            shapes=nnx.to_pure_dict(variables),
            axes=_metadata(variables, AXES),
            roles=_metadata(variables, "role"),
        )

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters as a nested dict; call under ``jit`` with shardings to place them directly."""
        with nnx.use_eager_sharding(False):
            return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key)), nnx.Param))

    def bind(self, params: Tree) -> Any:
        """The module holding ``params`` (arrays, tracers or shapes)."""
        return nnx.merge(self.graphdef, params)


def _metadata(variables: Any, name: str) -> Tree:
    is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(
        jax.tree.map(lambda v: v.get_metadata().get(name), variables, is_leaf=is_variable)
    )


def parameter_count(shapes: Tree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))

"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685): ``W + (alpha / r) A B`` with W fixed.

A reparametrisation of the tree of parameters: ``{"base": the model's own, "lora": the same tree cut down to
the adapted matrices, each ``{"A": [.., in, r], "B": [.., r, out]}``}``. Stacked layers have stacked adapters,
and A and B are sharded as the two sides of W are. B starts at zero, so that step 0 is the base to the bit.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from layers.param import Linear, project
from models.functional import Functional, Tree

Path = tuple[str | int, ...]

SETS: dict[str, tuple[str, ...]] = {
    "all": ("backbone/*/kernel",),  # every projection of every sub-layer, MLPs included
    "qv": ("*/q/kernel", "*/v/kernel"),  # the paper's choice for attention
    "qkv": ("*/q/kernel", "*/k/kernel", "*/v/kernel"),
    "ssm": ("*/in_*/kernel",),  # the input projections of state-space mixers
    "mlp": ("*/up/kernel", "*/gate/kernel", "*/down/kernel"),
}
"""Names that ``lora.targets`` may give in place of patterns."""
MATRIX_ROLES = ("matrix", "embedding", "head")
STACKED = ("layers", "experts")  # logical axes that stack independent matrices
ADAPTERS = 0x10FA  # folded into the key of the base's parameters, for the adapters' own


@dataclasses.dataclass
class LoRAConfig:
    """Low-rank adapters beside frozen matrices.

    Attributes:
        rank: r, 0 for no adapters.
        alpha: the product A B is scaled by alpha / r.
        targets: which matrices: names of :data:`SETS`, or glob patterns on the paths of a plain run's
            parameters.txt ("*" crosses "/"). A set leaves out matrices narrower than the rank, a pattern that
            matches one is an error.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all",)


def with_lora(model: Functional, config: LoRAConfig) -> Functional:
    """``model`` with adapters beside its targets; ``model`` itself if ``config.rank`` is 0.

    Roles: "adapter/A" and "adapter/B", and "frozen/<role>" for the base.

    Raises:
        ValueError: ``rank`` or ``alpha`` out of range, or a target that matches nothing, no matrix, or one
            that is narrower than ``rank``.
    """
    if config.rank == 0:
        return model
    if config.rank < 0 or not config.alpha > 0:
        raise ValueError(
            f"lora.rank={config.rank}, lora.alpha={config.alpha}: expected a rank of at least 1 (0 for no "
            "adapters) and a positive alpha"
        )
    shapes, axes, roles = (flatten_dict(tree) for tree in (model.shapes, model.axes, model.roles))
    paths = _targets(config, shapes, axes, roles)
    adapters = {path: _adapter(shapes[path], axes[path], config.rank) for path in paths}

    def beside(base: dict[Path, Any], lora: dict[Path, Any]) -> Tree:
        return {"base": unflatten_dict(base), "lora": unflatten_dict(lora)}

    return LoRA(
        build=model.build,
        graphdef=model.graphdef,
        shapes=beside(shapes, {path: shape for path, (shape, _) in adapters.items()}),
        axes=beside(axes, {path: axis for path, (_, axis) in adapters.items()}),
        roles=beside(
            {path: f"frozen/{role}" for path, role in roles.items()},
            {path: {"A": "adapter/A", "B": "adapter/B"} for path in paths},
        ),
        base=model,
        scale=config.alpha / config.rank,
        linear=_linear(model, paths),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA(Functional):
    """A `Functional` over ``{"base", "lora"}``.

    Attributes:
        base: the model without adapters.
        scale: alpha / r.
        linear: paths of the adapted matrices that are the kernel of a `Linear`.
    """

    base: Functional
    scale: float
    linear: frozenset[Path]

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters: the base's as without adapters, A uniform within 1 / sqrt(in), B zero."""
        own = jax.random.fold_in(key, ADAPTERS)
        made = {}
        for i, (path, leaf) in enumerate(flatten_dict(self.shapes["lora"]).items()):
            if path[-1] == "A":
                bound, draw = leaf.shape[-2] ** -0.5, jax.random.fold_in(own, i)
                made[path] = jax.random.uniform(draw, leaf.shape, leaf.dtype, -bound, bound)
            else:
                made[path] = jnp.zeros(leaf.shape, leaf.dtype)
        return {"base": self.base.init(key), "lora": unflatten_dict(made)}

    def bind(self, params: Tree) -> Any:
        """The adapted module. A `Linear` keeps its matrix and adds two thin products, so that the gradient
        of W is never computed; any other matrix is replaced by its sum with A B."""
        base, adapters = flatten_dict(params["base"]), _pairs(params["lora"])
        for path in adapters.keys() - self.linear:
            base[path] = self._sum(base[path], adapters[path])
        module = self.base.bind(unflatten_dict(base))
        for path in self.linear:
            pair, parent = adapters[path], _descend(module, path[:-2])
            linear = _child(parent, path[-2])
            _set_child(parent, path[-2], AdaptedLinear(linear, pair["A"], pair["B"], self.scale))
        return module

    def merge(self, params: Tree) -> Tree:
        """Parameters of ``base`` that compute the same: W + (alpha / r) A B in place of every target."""
        base = flatten_dict(params["base"])
        with jax.default_matmul_precision("highest"):
            for path, pair in _pairs(params["lora"]).items():
                base[path] = self._sum(base[path], pair)
        return unflatten_dict(base)

    def _sum(self, matrix: Any, pair: dict[str, Any]) -> Any:
        if isinstance(matrix, jax.ShapeDtypeStruct):  # bound to shapes, for what depends on no value
            return matrix
        return matrix + (self.scale * pair["A"] @ pair["B"]).astype(matrix.dtype)


class AdaptedLinear(nnx.Module):
    """``linear(x) + scale (x A) B``.

    Args:
        A, B: [.., in, r] and [.., r, out], stacked as the kernel of ``linear`` is.
    """

    def __init__(self, linear: Linear, A: Any, B: Any, scale: float):  # arrays, tracers or shapes
        self.linear, self.scale = linear, scale
        self.A, self.B = nnx.Param(A), nnx.Param(B)

    def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b O"]:
        return self.linear(x) + self.scale * project(project(x, self.A[...]), self.B[...])


def _targets(config: LoRAConfig, shapes: dict, axes: dict, roles: dict) -> list[Path]:
    """Paths of the matrices that get adapters, in the order of the parameters."""
    names = {"/".join(map(str, path)): path for path in shapes}
    chosen: set[str] = set()
    for target in config.targets:
        matched = [name for p in SETS.get(target, (target,)) for name in fnmatch.filter(names, p)]
        if target in SETS:
            matched = [n for n in matched if _width(shapes[names[n]], axes[names[n]]) >= config.rank]
        if not matched:
            raise ValueError(
                f"lora.targets: {target!r} matches no matrix of rank {config.rank} or more; use one of "
                f"{', '.join(SETS)}, or a pattern that matches some of {_examples(names, axes, roles)}"
            )
        chosen.update(matched)
    for name in chosen:
        shape, axis, role = (tree[names[name]] for tree in (shapes, axes, roles))
        if not _is_matrix(axis, role):
            raise ValueError(
                f"lora.targets: {name} of shape {shape.shape}, role {role!r}, is no matrix; matrices are "
                f"{_examples(names, axes, roles)}"
            )
        if _width(shape, axis) < config.rank:
            raise ValueError(
                f"lora.rank={config.rank} is larger than the matrix {name} of shape {shape.shape}: use at "
                f"most {_width(shape, axis)}, or lora.targets that leave it out"
            )
    return [path for name, path in names.items() if name in chosen]


def _examples(names: dict[str, Path], axes: dict, roles: dict) -> str:
    """The ends of the matrices' paths, each once."""
    ends = {"*/" + "/".join(map(str, p[-2:])) for p in names.values() if _is_matrix(axes[p], roles[p])}
    return ", ".join(sorted(ends))


def _is_matrix(axes: Sequence[str | None], role: str) -> bool:
    return role.split("/")[0] in MATRIX_ROLES and len([a for a in axes if a not in STACKED]) == 2


def _width(shape: jax.ShapeDtypeStruct, axes: Sequence[str | None]) -> int:
    """The shorter side of a matrix; 0 for what is none."""
    sides = [n for n, axis in zip(shape.shape, axes) if axis not in STACKED]
    return min(sides) if len(sides) == 2 else 0


def _adapter(shape: jax.ShapeDtypeStruct, axes: Sequence[str | None], rank: int) -> tuple[dict, dict]:
    """Shapes and logical axes of A and B; the stacking axes come first, as in the matrix."""
    *stack, rows, columns = shape.shape
    *over, row_axis, column_axis = axes
    make = lambda *sides: jax.ShapeDtypeStruct((*stack, *sides), shape.dtype)  # noqa: E731
    return (
        {"A": make(rows, rank), "B": make(rank, columns)},
        {"A": (*over, row_axis, None), "B": (*over, None, column_axis)},
    )


def _pairs(lora: Tree) -> dict[Path, dict[str, Any]]:
    """``{"A", "B"}`` by the path of the matrix."""
    flat = flatten_dict(lora)
    return {
        path[:-1]: {"A": flat[*path[:-1], "A"], "B": leaf} for path, leaf in flat.items() if path[-1] == "B"
    }


def _linear(model: Functional, paths: Sequence[Path]) -> frozenset[Path]:
    module = model.bind(model.shapes)
    return frozenset(p for p in paths if p[-1] == "kernel" and isinstance(_descend(module, p[:-1]), Linear))


def _descend(module: Any, path: Path) -> Any:
    for key in path:
        module = _child(module, key)
    return module


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(module, (nnx.List, nnx.Dict)) else getattr(module, key)


def _set_child(module: Any, key: Any, child: nnx.Module) -> None:
    if isinstance(module, (nnx.List, nnx.Dict)):
        module[key] = child
    else:
        setattr(module, key, child)

"""The optimizer: every parameter's role decides its algorithm, learning rate and weight decay.

Beside the parameters come two trees of the same structure: ``roles`` (one string a leaf, hierarchical:
"matrix", "dynamics/A") and ``axes`` (one tuple of logical axis names a leaf, "layers" first where layers are
stacked). A leaf belongs to the configured group with the longest prefix of its role, or else to the group
named after the first part of its role, with the defaults.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Num, PyTree

from runtime.schedule import ScheduleConfig, check_schedule, make_schedule

ROLES = ("matrix", "embedding", "head", "vector", "conv", "dynamics", "adapter")
"""The known first parts of roles."""
FROZEN = "frozen"
"""First part of the role of a parameter that is not trained, before its own role; no group changes it."""
STACKED = ("layers", "experts")
"""Axes that stack independent weights; Muon treats them as a batch of matrices."""
ALGORITHMS = ("adamw", "muon", "frozen")


@dataclasses.dataclass
class GroupConfig:
    """What differs from the defaults for the roles under one prefix.

    Attributes:
        lr_factor: the group's peak rate as a multiple of its algorithm's (``optim.lr`` or ``optim.muon_lr``).
        lr: the peak rate itself, in place of ``lr_factor``; does not move when ``optim.lr`` is changed.
        weight_decay: decay coefficient; None means the algorithm's for "matrix" and 0 for every other role.
        algorithm: "adamw", "muon" or "frozen" (no update, no optimizer state); None means the default.
    """

    lr_factor: float = 1.0
    lr: float | None = None
    weight_decay: float | None = None
    algorithm: str | None = None


@dataclasses.dataclass
class OptimConfig:
    """The optimizer, gradient accumulation and what guards the update.

    Weight decay is decoupled and multiplied by the learning rate. It applies to the role "matrix" only:
    vectors, dynamics, convolutions, embeddings and heads are not decayed unless a group says so (a recipe
    that decays embeddings, as GPT's do, adds ``groups={"embedding": GroupConfig(weight_decay=0.1)}``).

    Attributes:
        name: "adamw", or "muon": Muon on the role "matrix", Adam elsewhere.
        lr, b1, b2, eps, weight_decay: of AdamW (arXiv:1711.05101); ``lr`` is the peak of the schedule.
        clip_norm: largest global norm of the gradient; None or inf for no clipping.
        muon_lr, muon_beta, muon_weight_decay: of Muon, with 5 Newton-Schulz steps and Nesterov momentum.
        accumulation: number of microbatches a batch is computed in.
        ema_decay: decay of the moving average of the parameters that is evaluated, None for no average.
        skip_nonfinite: whether a step whose loss or gradient is not finite leaves the state as it was.
        groups: role prefix to what differs there. Only the longest matching prefix counts.
        schedule: the factor of every peak rate over the run.
    """

    name: str = "adamw"
    lr: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    muon_lr: float = 0.02
    muon_beta: float = 0.95
    muon_weight_decay: float = 0.05
    accumulation: int = 1
    ema_decay: float | None = None
    skip_nonfinite: bool = False
    groups: dict[str, GroupConfig] = dataclasses.field(default_factory=dict)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)


class GroupRow(NamedTuple):
    """One parameter in the table of groups; ``lr`` is its peak rate, ``lr_factor`` that over ``optim.lr``."""

    path: str
    shape: tuple[int, ...]
    role: str
    group: str
    algorithm: str
    lr: float
    lr_factor: float
    weight_decay: float


def make_optimizer(
    config: OptimConfig, roles: PyTree, axes: PyTree, params_shapes: PyTree, total_steps: int
) -> optax.GradientTransformation:
    """Clipping by global norm, then the algorithm of each group, then the schedule.

    Args:
        roles, axes: trees of the structure of the parameters: a role, and a tuple of axis names, a leaf.
        params_shapes: the parameters, or their shapes (``jax.ShapeDtypeStruct``).
        total_steps: length of the run in updates.

    Raises:
        ValueError: a field is out of range, a role is unknown, a group has no possible member, or Muon is
            asked to treat a parameter that is not a (stack of) matrices; the message names it.
    """
    check_optim(config, total_steps)
    rows = group_table(config, roles, axes, params_shapes)
    structure: Any = jax.tree.structure(params_shapes)
    labels = structure.unflatten([row.group for row in rows])
    matrices = structure.unflatten(
        [_matrix_axes(a, row) for a, row in zip(structure.flatten_up_to(axes), rows)]
    )
    transforms = {row.group: _group_transform(config, row, matrices) for row in rows}
    unclipped = config.clip_norm is None or math.isinf(config.clip_norm)
    clip = optax.identity() if unclipped else optax.clip_by_global_norm(config.clip_norm)
    schedule = make_schedule(config.schedule, total_steps)
    return optax.chain(clip, optax.partition(transforms, labels), optax.scale_by_schedule(schedule))


def group_table(config: OptimConfig, roles: PyTree, axes: PyTree, params_shapes: PyTree) -> list[GroupRow]:
    """One row a parameter, in the order of ``jax.tree.leaves``; raises as :func:`make_optimizer` does."""
    for prefix in config.groups:
        if prefix.split("/")[0] not in ROLES:
            raise ValueError(
                f"optim.groups[{prefix!r}]: no parameter can have this role; prefixes start with one of "
                f"{', '.join(ROLES)}."
            )
    leaves = jax.tree_util.tree_flatten_with_path(params_shapes)[0]
    structure: Any = jax.tree.structure(params_shapes)
    rows = []
    for (keys, leaf), role, names in zip(
        leaves, structure.flatten_up_to(roles), structure.flatten_up_to(axes)
    ):
        row = _row(config, parameter_path(keys), tuple(leaf.shape), role)
        if len(names) != len(row.shape):
            raise ValueError(f"parameter {row.path} of shape {row.shape} has the axis names {tuple(names)}.")
        _matrix_axes(names, row)
        rows.append(row)
    return rows


def trained_parameters(config: OptimConfig, roles: PyTree, axes: PyTree, params_shapes: PyTree) -> PyTree:
    """A bool a parameter: whether it is updated at all.

    Raises:
        ValueError: none is.
    """
    trained = [row.algorithm != FROZEN for row in group_table(config, roles, axes, params_shapes)]
    if not any(trained):
        raise ValueError(
            "every parameter is frozen, by train.freeze, train.unfreeze or optim.groups: nothing would train"
        )
    structure: Any = jax.tree.structure(params_shapes)
    return structure.unflatten(trained)


def format_table(rows: Sequence[GroupRow]) -> str:
    """The rows as aligned text, with a header and the number of parameters a group."""
    cells = [("parameter", "shape", "role", "group", "algorithm", "lr", "factor", "decay")]
    sizes: dict[str, int] = {}
    for row in rows:
        shape = "x".join(map(str, row.shape)) or "scalar"
        numbers = (f"{row.lr:.3g}", f"{row.lr_factor:.3g}", f"{row.weight_decay:.3g}")
        cells.append((row.path, shape, row.role, row.group, row.algorithm, *numbers))
        sizes[row.group] = sizes.get(row.group, 0) + math.prod(row.shape)
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([*lines, "", *(f"{group}: {size:,} parameters" for group, size in sizes.items())])


def update_ema(ema: PyTree, params: PyTree, decay: float, step: Num[Array, ""] | int) -> PyTree:
    """The moving average after update number ``step`` (0 for the first), in float32 or wider.

    The decay rises as (1 + step) / (10 + step) until it reaches ``decay``, so that the initial parameters are
    soon forgotten.
    """
    step = jnp.asarray(step, jnp.float32)
    rest = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + rest * (p.astype(e.dtype) - e), ema, params)


def check_optim(config: OptimConfig, total_steps: int) -> None:
    """Raises ValueError naming the first field of ``config`` that is out of range."""

    def require(ok: bool, field: str, value: object, expected: str) -> None:
        if not ok:
            raise ValueError(f"optim.{field}={value!r}: expected {expected}.")

    require(config.name in ("adamw", "muon"), "name", config.name, '"adamw" or "muon"')
    for field in ("lr", "eps", "muon_lr"):
        require(getattr(config, field) > 0, field, getattr(config, field), "a positive number")
    for field in ("b1", "b2", "muon_beta"):
        value = getattr(config, field)
        require(0 <= value < 1, field, value, "a number from 0 to below 1")
    for field in ("weight_decay", "muon_weight_decay"):
        require(getattr(config, field) >= 0, field, getattr(config, field), "at least 0")
    clip, ema = config.clip_norm, config.ema_decay
    require(clip is None or clip > 0, "clip_norm", clip, "a positive number, inf for no clipping")
    require(config.accumulation >= 1, "accumulation", config.accumulation, "at least 1 microbatch")
    require(ema is None or 0 <= ema < 1, "ema_decay", ema, "a number from 0 to below 1, or None")
    for prefix, group in config.groups.items():
        where = f"groups[{prefix!r}]."
        require(group.lr_factor >= 0, where + "lr_factor", group.lr_factor, "at least 0")
        require(group.lr is None or group.lr >= 0, where + "lr", group.lr, "at least 0, or None")
        both = group.lr is not None and group.lr_factor != 1.0
        require(not both, where + "lr_factor", group.lr_factor, "1.0 when lr is set")
        decay = group.weight_decay
        require(decay is None or decay >= 0, where + "weight_decay", decay, "at least 0, or None")
        algorithm = group.algorithm
        known = algorithm is None or algorithm in ALGORITHMS
        require(known, where + "algorithm", algorithm, f"one of {', '.join(ALGORITHMS)}, or None")
    check_schedule(config.schedule, total_steps)


def parameter_path(keys: Sequence[Any]) -> str:
    """A key path of jax as "blocks/mixer/kernel"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def _row(config: OptimConfig, path: str, shape: tuple[int, ...], role: str) -> GroupRow:
    """The group of one parameter, and what the group does."""
    parts = role.split("/") if isinstance(role, str) else [""]
    if parts[0] == FROZEN:
        return GroupRow(path, shape, role, FROZEN, FROZEN, 0.0, 0.0, 0.0)
    if parts[0] not in ROLES:
        raise ValueError(
            f"parameter {path} has the role {role!r}: expected one that starts with {', '.join(ROLES)}."
        )
    prefixes = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    name = next((prefix for prefix in prefixes if prefix in config.groups), parts[0])
    group = config.groups.get(name, GroupConfig())
    default = "muon" if config.name == "muon" and parts[0] == "matrix" else "adamw"
    algorithm = group.algorithm or default
    peak, decay = {
        "adamw": (config.lr, config.weight_decay),
        "muon": (config.muon_lr, config.muon_weight_decay),
        "frozen": (0.0, 0.0),
    }[algorithm]
    if parts[0] != "matrix":
        decay = 0.0
    if algorithm != "frozen":
        peak = peak * group.lr_factor if group.lr is None else group.lr
        decay = decay if group.weight_decay is None else group.weight_decay
    over_nothing = math.inf if peak else 1.0
    factor = peak / config.lr if config.lr else over_nothing
    return GroupRow(path, shape, role, name, algorithm, peak, factor, decay)


def _matrix_axes(names: Sequence[str | None], row: GroupRow) -> optax.contrib.MuonDimensionNumbers:
    """The two axes of a matrix under Muon, [.., in, out]; all others stack matrices."""
    if row.algorithm != "muon":
        return optax.contrib.MuonDimensionNumbers()
    matrix = [i for i, name in enumerate(names) if name not in STACKED]
    if len(matrix) != 2:
        raise ValueError(
            f"parameter {row.path} of shape {row.shape}, axes {tuple(names)}, is under Muon but is no matrix "
            f"(two axes beside {' and '.join(STACKED)}): give it another role than {row.role!r}, or set "
            f"optim.groups[{row.role!r}].algorithm='adamw'."
        )
    return optax.contrib.MuonDimensionNumbers(reduction_axis=matrix[0], output_axis=matrix[1])


def _group_transform(config: OptimConfig, row: GroupRow, matrices: PyTree) -> optax.GradientTransformation:
    """What the group of ``row`` does, at its peak learning rate."""
    if row.algorithm == "frozen":
        return optax.set_to_zero()
    if row.algorithm == "muon":
        direction = _muon(config, matrices)
    else:
        direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(direction, optax.add_decayed_weights(row.weight_decay), optax.scale(-row.lr))


def _muon(config: OptimConfig, matrices: PyTree) -> optax.GradientTransformation:
    """Muon's direction, times sqrt(max(1, out / in)) (https://kellerjordan.github.io/posts/muon/)."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def of_group(updates: PyTree) -> PyTree:
        # Parameters of other groups are MaskedNodes here, and must be in the tree of matrix axes too.
        return jax.tree.map(lambda u, m: u if masked(u) else m, updates, matrices, is_leaf=masked)

    def widen(u: Any, m: optax.contrib.MuonDimensionNumbers) -> Any:
        return u if masked(u) else u * max(1.0, u.shape[m.output_axis] / u.shape[m.reduction_axis]) ** 0.5

    return optax.chain(
        optax.contrib.scale_by_muon(beta=config.muon_beta, weight_dimension_numbers=of_group),
        optax.stateless(lambda updates, _: jax.tree.map(widen, updates, matrices, is_leaf=masked)),
    )

"""The device mesh, and the one table that maps logical axis names to it.

Mesh axes: ``data`` (replicated parameters) and ``fsdp`` (parameters split over it) share the batch;
``tensor`` splits heads and channels; ``sequence`` splits time.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from runtime.state import WHOLE, TrainState

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = ("data", "fsdp")
PIECES = {"contiguous": 1, "zigzag": 2}  # of time on each device of the sequence axis, by layout

RULES: dict[str, str | None] = {
    "embed": "fsdp",  # the width of the residual stream
    "mlp": "tensor",
    "inner": "tensor",  # channels of a mixer
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab_out": "tensor",  # of the head
    # Splitting the rows of the embedding table would make XLA gather the table, or all activations.
    "vocab": None,
    "positions": None,
    # B and C of an SSM: small, and usually fewer groups than devices to share them.
    "groups": None,
    "layers": None,
    "experts": None,
    "norm": None,
    "state": None,
}
"""Logical axis name of a parameter's dimension to the mesh axis it is split over, None for none."""


@dataclasses.dataclass
class MeshConfig:
    """Number of devices along each mesh axis; at most one -1, which takes the rest.

    ``sequence_layout`` is the order of tokens along the sequence axis: "contiguous", or "zigzag", which gives
    each device an early and a late piece of time, and so equal work in causal attention.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    sequence_layout: str = "contiguous"


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over ``devices`` (default: all), with Auto axis types.

    On several TPU slices ``data`` is laid across them, so that only its gradient reduction leaves a slice.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or ``data`` to that of slices; an
            unknown ``sequence_layout``.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(f"mesh.data={shape[0]} must be a multiple of the number of slices, {slices}.")
        within = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1, 1), devices)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(config: MeshConfig, device_count: int) -> tuple[int, int, int, int]:
    """(data, fsdp, tensor, sequence) with the -1 resolved for ``device_count`` devices.

    Raises:
        ValueError: as :func:`make_mesh`.
    """
    if config.sequence_layout not in PIECES:
        raise ValueError(
            f"mesh.sequence_layout={config.sequence_layout!r} is unknown; use one of {sorted(PIECES)}."
        )
    sizes = [getattr(config, axis) for axis in AXES]
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"{asked}: expected positive sizes and at most one -1 (the rest of the devices).")
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if device_count % given:
            raise ValueError(
                f"{asked}: the given sizes multiply to {given}, which does not divide {device_count} devices."
            )
        sizes[sizes.index(-1)] = device_count // given
    elif given != device_count:
        raise ValueError(
            f"{asked}: the sizes multiply to {given} but there are {device_count} devices; set one axis "
            "to -1, or sizes whose product is the number of devices."
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]


def describe(mesh: Mesh) -> str:
    """One line, such as "8 cpu devices, 1 process: data 2, fsdp 2, tensor 2, sequence 1"."""
    devices = mesh.devices.flat
    processes = len({d.process_index for d in devices})
    kind = mesh.devices.flat[0].device_kind
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    plural = ("s" if mesh.size > 1 else "", "es" if processes > 1 else "")
    return f"{mesh.size} {kind} device{plural[0]}, {processes} process{plural[1]}: {sizes}"


def param_shardings(mesh: Mesh | AbstractMesh, axes: PyTree, shapes: PyTree) -> PyTree:
    """A ``NamedSharding`` a parameter, from its logical axes through :data:`RULES`.

    Args:
        axes: tree of tuples of logical axis names, of the structure of ``shapes``.
        shapes: the parameters, or ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError: an unknown name, one mesh axis twice in a parameter, or dimensions that their mesh axes do
            not divide; the message lists every such parameter.
    """
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    structure: Any = jax.tree.structure(shapes)
    names_of = [tuple(names) for names in structure.flatten_up_to(axes)]
    problems: list[str] = []
    for (keys, leaf), names in zip(leaves, names_of):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        where = f"parameter {path} of shape {tuple(leaf.shape)}, axes {names}"
        problems += [f"{where}: {problem}" for problem in _problems(mesh, names, tuple(leaf.shape))]
    if problems:
        raise ValueError("\n".join(problems))
    specs = [PartitionSpec(*(None if name is None else RULES[name] for name in names)) for names in names_of]
    return structure.unflatten([NamedSharding(mesh, spec) for spec in specs])


def _problems(mesh: Mesh | AbstractMesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> list[str]:
    """What stands against sharding one parameter by its axis names."""
    if len(names) != len(shape):
        return [f"{len(names)} axis names for {len(shape)} dimensions."]
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        return [f"unknown logical axis {unknown[0]!r}; the rules table knows {', '.join(sorted(RULES))}."]
    used = [RULES[name] for name in names if name is not None and RULES[name] is not None]
    if len(set(used)) < len(used):
        twice = ", ".join(map(str, used))
        return [f"two dimensions map to one mesh axis ({twice}); set one of the names to None."]
    problems = []
    for name, size in zip(names, shape):
        axis = RULES[name] if name is not None else None
        parts = mesh.shape[axis] if axis is not None else 1
        if size % parts:
            fit = [n for n in range(1, parts) if size % n == 0]
            next_size = math.ceil(size / parts) * parts
            problems.append(
                f"dimension {name!r} of size {size} is split over mesh.{axis}={parts}, which does not divide "
                f"it; use a multiple of {parts} (such as {next_size}), or mesh.{axis} in {fit}."
            )
    return problems


def state_shardings(
    mesh: Mesh,
    tx: optax.GradientTransformation,
    abstract_state: TrainState,
    param_shardings: PyTree,
    extras: dict[str, PyTree] | None = None,
) -> TrainState:
    """A ``NamedSharding`` for every leaf of the train state.

    Optimizer moments and the moving average are laid out as their parameters; all else is replicated, except
    what ``extras`` gives shardings for (``{"carry": carry_shardings(...)}``).
    """
    replicated: Any = NamedSharding(mesh, PartitionSpec())

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    # optax.partition leaves a MaskedNode where another group owns the parameter; it has no array to shard.
    opt_state = optax.tree.map_params(
        tx,
        lambda leaf, sharding: leaf if masked(leaf) else sharding,
        abstract_state.opt_state,
        param_shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=masked,
    )
    given = {"ema": param_shardings, **(extras or {})}
    other = {
        name: given[name] if name in given else jax.tree.map(lambda _: replicated, value)
        for name, value in abstract_state.extras.items()
    }
    return TrainState(step=replicated, params=param_shardings, opt_state=opt_state, extras=other)


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Of an array [B, L, ...] (or [B], for ``ndim=1``): B over data and fsdp, L over sequence."""
    return NamedSharding(mesh, PartitionSpec(BATCH, "sequence") if ndim > 1 else PartitionSpec(BATCH))


def carry_shardings(mesh: Mesh, carry: PyTree, carry_axes: PyTree = 0) -> PyTree:
    """Of carried mixer states: B, at ``carry_axes`` (an int or a tree prefix), over data and fsdp."""

    def sharding(axis: int) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec() if axis == WHOLE else PartitionSpec(*[None] * axis, BATCH))

    return jax.tree.map(lambda axis, part: jax.tree.map(lambda _: sharding(axis), part), carry_axes, carry)


def check_batch(
    mesh: Mesh | AbstractMesh,
    batch_size: int,
    seq_len: int,
    microbatches: int = 1,
    prefix: str = "",
    layout: str = "contiguous",
) -> None:
    """Raises ValueError, naming the field, unless every device gets equal parts of every microbatch.

    Args:
        prefix: of the field names, such as "eval_".
        layout: ``MeshConfig.sequence_layout``.
    """
    rows = math.prod(mesh.shape[axis] for axis in BATCH)
    unit = rows * microbatches
    if batch_size < 1 or batch_size % unit:
        raise ValueError(
            f"task.{prefix}batch_size={batch_size} must be a multiple of {unit} = "
            f"mesh.data {mesh.shape['data']} x mesh.fsdp {mesh.shape['fsdp']} x "
            f"optim.accumulation {microbatches}; "
            f"{max(math.ceil(batch_size / unit), 1) * unit} would work."
        )
    parts, pieces = mesh.shape["sequence"], f"mesh.sequence={mesh.shape['sequence']}"
    if parts > 1 and PIECES[layout] > 1:
        parts, pieces = parts * PIECES[layout], f"{parts * PIECES[layout]} = {PIECES[layout]} x {pieces}"
        pieces += f" (mesh.sequence_layout={layout!r})"
    if seq_len < 1 or seq_len % parts:
        raise ValueError(
            f"task.{prefix}seq_len={seq_len} must be a multiple of {pieces}; "
            f"{max(math.ceil(seq_len / parts), 1) * parts} would work."
        )

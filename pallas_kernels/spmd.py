"""What every op knows about the device mesh: its axis names, and whether one is active.

A mesh has the axes ``(data, fsdp, tensor, sequence)``, each possibly of size one. Batch is split over
``data`` and ``fsdp``, heads or channels over ``tensor``, time over ``sequence``. An op that finds a mesh
active wraps itself in a fully manual ``jax.shard_map``: GSPMD cannot partition a Pallas call, and would
answer a recurrence over a sharded time axis with dozens of collectives.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

DATA, FSDP, TENSOR, SEQUENCE = "data", "fsdp", "tensor", "sequence"
AXES = (DATA, FSDP, TENSOR, SEQUENCE)
BATCH = (DATA, FSDP)


def active_mesh() -> AbstractMesh | None:
    """The mesh in force, or None: no mesh, a mesh of one device, or already inside a ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    if any(kind == AxisType.Manual for kind in mesh.axis_types):
        return None
    return mesh


def axes_dividing(
    mesh: AbstractMesh, names: str | tuple[str, ...], size: int
) -> str | tuple[str, ...] | None:
    """``names`` if the product of those mesh axes is above one and divides ``size``, else None."""
    present = tuple(n for n in ((names,) if isinstance(names, str) else names) if mesh.shape.get(n, 1) > 1)
    parts = math.prod(mesh.shape[n] for n in present)
    if not present or size % parts:
        return None
    return present[0] if len(present) == 1 else present


def shard_activations(x: jax.Array) -> jax.Array:
    """Constrain activations ``x[B, L, ...]`` to batch over (data, fsdp) and time over sequence."""
    mesh = active_mesh()
    if mesh is None or x.ndim < 2:
        return x
    spec = PartitionSpec(axes_dividing(mesh, BATCH, x.shape[0]), axes_dividing(mesh, SEQUENCE, x.shape[1]))
    return jax.lax.with_sharding_constraint(x, spec)


def replicate_time(x: jax.Array) -> jax.Array:
    """Constrain ``x[B, ...]`` to batch over (data, fsdp) and nothing else.

    For segment ids and positions: every device then scans along whole rows of them by itself, at the price of
    one gather of integers, where a cumulative sum over sharded time would take several collectives.
    """
    mesh = active_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes_dividing(mesh, BATCH, x.shape[0])))


def replicate(x: jax.Array) -> jax.Array:
    """Constrain ``x`` to be whole on every device: gathers a parameter before use."""
    return x if active_mesh() is None else jax.lax.with_sharding_constraint(x, PartitionSpec())


def sequence_parts() -> int:
    """Number of devices the time axis is split over under the active mesh (1 without one)."""
    mesh = active_mesh()
    return 1 if mesh is None else mesh.shape.get(SEQUENCE, 1)

"""Compile for a TPU on a machine that has none: libtpu's compiler against a described topology.

Needs the ``libtpu`` wheel (``pip install -e '.[aot]'`` brings it; Linux). Nothing is executed; what comes
back is the compiled program with its HLO, memory and costs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The smallest topology of each chip.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def unavailable() -> str | None:
    """Why nothing can be compiled for TPU here, or None."""
    if os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu"):
        return None
    return "libtpu is not installed (a Linux x86-64 wheel: pip install -e '.[aot]')"


@functools.cache
def topology(name: str) -> topologies.TopologyDescription:
    """A described topology: a chip of ``TOPOLOGIES``, or libtpu's own name such as "v5e:4x4".

    Raises:
        RuntimeError: libtpu is not installed, or does not know the name.
    """
    if reason := unavailable():
        raise RuntimeError(f"cannot compile for {name}: {reason}")
    # Several processes may hold the library, and no metadata server need be asked which chips are here.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES.get(name, name))
    except Exception as error:
        raise RuntimeError(
            f"libtpu does not describe the topology {name!r}; try one of {list(TOPOLOGIES)}"
        ) from error


def compile_for(chip: str, function: Callable, *args, any_layout: bool = False) -> jax.stages.Compiled:
    """``jax.jit(function)`` compiled for one device of ``chip``.

    Args:
        args: pytrees of arrays or ``jax.ShapeDtypeStruct``; only shapes and dtypes are read.
        any_layout: the compiler chooses the layouts of arguments and results; row-major otherwise.
    """
    # Pallas asks the mesh in force which chip it compiles for, and the local device without one.
    mesh = Mesh(topology(chip).devices[:1], ("device",))
    whole = PartitionSpec()
    place = NamedSharding(mesh, whole)
    described = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=place), args)
    with jax.set_mesh(mesh):
        on_device = jax.shard_map(function, in_specs=whole, out_specs=whole, check_vma=False)
        jitted = jax.jit(on_device)
        if any_layout:
            automatic = Format(Layout.AUTO)
            jitted = jax.jit(on_device, in_shardings=automatic, out_shardings=automatic)
        return jitted.lower(*described).compile()

"""Why a compiled program's collectives are there: each by the rows of the table of those expected."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from models.functional import Functional
from runtime.mesh import RULES
from tools.aot.collectives import Collective, Part
from tools.aot.expected import ACTIVATION, EXPECTED, PARAMETER, SCALAR, Expected
from tools.aot.hlo import Program, op_name


def explain(found: Sequence[Collective], model: Functional, mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """Names of the rows of ``EXPECTED`` for the arrays of each collective; () where one has none."""
    sizes, explained = parameter_sizes(model, mesh), {}
    for c in found:
        rows = [
            next((row.name for row in EXPECTED if _matches(row, c, part, sizes)), None) for part in c.parts
        ]
        names = tuple(dict.fromkeys(row for row in rows if row is not None))
        explained[c.name] = () if None in rows else names
    return explained


def _matches(row: Expected, c: Collective, part: Part, sizes: set[int]) -> bool:
    if not set(c.axes) <= set(row.axes) or c.kind not in row.kinds or over(part, sizes) not in row.over:
        return False
    if not part.op_name and not part.frames:
        return row.anonymous
    if row.backward and "transpose" not in part.op_name:
        return False
    return not row.files or (bool(part.frames) and part.frames[-1].file.startswith(row.files))


def over(part: Part, sizes: set[int]) -> str:
    """What an array is: a few numbers, a part of a parameter, or else an activation."""
    count = math.prod(part.dims)
    if count in sizes:
        return PARAMETER
    return SCALAR if count <= 64 else ACTIVATION


def parameter_sizes(model: Functional, mesh: Mesh) -> set[int]:
    """Numbers that any part of a parameter can have: whole or split along some of its axes, of all layers
    that are stacked or of one."""
    found = set()
    structure: Any = jax.tree.structure(model.shapes)
    for leaf, names in zip(jax.tree.leaves(model.shapes), structure.flatten_up_to(model.axes)):
        split = [mesh.shape[axis] for n in names if n is not None and (axis := RULES[n]) is not None]
        layers = leaf.shape[0] if names and names[0] == "layers" else 1
        split += [mesh.shape["tensor"]]  # XLA may compute a gradient in parts that the parameter is not in
        for taken in itertools.product(*((1, n) for n in split)):
            found |= {leaf.size // math.prod(taken), leaf.size // layers // math.prod(taken)}
    return found - {0, 1}


def kernels(program: Program) -> dict[str, int]:
    """How often each Pallas kernel for TPU runs, by the op that calls it (a pass of a loop each)."""
    found: Counter[str] = Counter()
    for executed in program.executed():
        i = executed.instruction
        if i.opcode == "custom-call" and '"tpu_custom_call"' in i.attributes:
            name = op_name(i).rstrip("/").rpartition("/")[2]
            found[name if name != "pallas_call" else i.name.partition(".")[0]] += executed.times
    return dict(found)


def summary(collectives: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Collectives of ``aot.json`` by kind, axes and row of the table: how many, executions, bytes in all."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for c in collectives:
        groups.setdefault((c["kind"], tuple(c["axes"]), c["expected"]), []).append(c)
    rows = [
        {
            "kind": kind,
            "axes": list(axes),
            "expected": expected,
            "count": len(members),
            "times": sum(c["times"] for c in members),
            "counted": all(c["counted"] for c in members),
            "bytes": sum(c["times"] * c["bytes"] for c in members),
        }
        for (kind, axes, expected), members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])

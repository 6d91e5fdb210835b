"""What the devices of a compiled program say to each other: kind, mesh axes, how often, how much, and why."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from benchmarks.hlo_bytes import Instruction
from tools.aot.hlo import Executed, Frame, Program, op_name, shapes

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_OPCODES = {name: kind for kind in KINDS for name in (kind, f"{kind}-start")}
_OPCODES |= {"ragged-all-to-all": "all-to-all", "collective-broadcast": "all-gather"}
# XLA for TPU writes a reduce-scatter as a fusion of an all-reduce and a slice, of this name.
_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Part:
    """An array that a collective gathers, reduces or moves; XLA merges several into one.

    Attributes:
        dims, bytes: of the array, whole as it is gathered or reduced.
        op_name: jax's path of transformations, "" where the compiler made it of several or from nothing.
        frames: where in this repository it comes from, the innermost call last.
    """

    dims: tuple[int, ...]
    bytes: int
    op_name: str
    frames: tuple[Frame, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        name: of the instruction.
        kind: of ``KINDS``.
        axes: mesh axes along which devices take part, in the order of the mesh.
        times: executions in a run of the program, at least (see ``counted``).
        counted: whether the trips of all loops around it are known.
        parts: the arrays.
    """

    name: str
    kind: str
    axes: tuple[str, ...]
    times: int
    counted: bool
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Of all arrays, once: what a device has after a gather or before a reduction."""
        return sum(part.bytes for part in self.parts)

    @property
    def total(self) -> int:
        """Bytes in all executions."""
        return self.times * self.bytes

    @property
    def where(self) -> str:
        """The innermost place of the largest array that has one, "" where none has."""
        placed = [part for part in self.parts if part.frames]
        return str(max(placed, key=lambda part: part.bytes).frames[-1]) if placed else ""


def collectives(program: Program, mesh: Mesh) -> list[Collective]:
    """All of ``program``, the most bytes first; of what is sent in pieces between other work, once."""
    found: dict[str, Collective] = {}
    for executed in program.executed():
        if executed.instruction.opcode not in _OPCODES:
            continue
        made = _collective(program, mesh, executed)
        # One that goes on beside other work appears where it starts, goes on and ends, with one chain.
        chain = re.search(r'channel_id=\d+.*chain_id="\d+"', executed.instruction.attributes)
        key = chain[0] if chain else made.name
        before = found.get(key)
        if before is None or (made.where and not before.where):
            found[key] = made
    return sorted((c for c in found.values() if c.axes), key=lambda c: -c.total)


def _collective(program: Program, mesh: Mesh, executed: Executed) -> Collective:
    i = executed.instruction
    kind = _OPCODES[i.opcode]
    if kind == "all-reduce" and _SCATTER in executed.computation:
        kind = "reduce-scatter"
    arrays = shapes(i.shape)
    if i.opcode in ("all-gather-start", "collective-permute-start"):  # (what goes in, what comes out, flags)
        arrays = [a for a in arrays if a[0]] or arrays
        arrays = arrays[len(arrays) // 2 :]
    return Collective(
        name=i.name,
        kind=kind,
        axes=axes_of(mesh, i),
        times=executed.times,
        counted=executed.counted,
        parts=tuple(
            _part(program, executed, dims, size, operand if len(arrays) > 1 else None)
            for (dims, size), operand in itertools.zip_longest(arrays, i.operands[: len(arrays)])
        ),
    )


def _part(
    program: Program, executed: Executed, dims: tuple[int, ...], size: int, operand: str | None
) -> Part:
    """One array; of several, each is told by what computed it, as far as that can be seen."""
    source = program.origin(executed.computation, operand) if operand else None
    told = [t for t in (source, executed.instruction, executed.caller) if t is not None]
    told = [t for t in told if program.frames(t)] or told
    return Part(dims, size, op_name(told[0]), program.frames(told[0]))


def axes_of(mesh: Mesh, i: Instruction) -> tuple[str, ...]:
    """The mesh axes along which the devices of its groups, or senders and receivers, differ.

    Raises:
        ValueError: groups written in a way that is not known here.
    """
    sizes = tuple(mesh.shape.values())
    differ = np.zeros(len(sizes), bool)
    for group in _groups(i.attributes, mesh.size):
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, d in zip(mesh.axis_names, differ) if d)


def _groups(attributes: str, devices: int) -> Iterable[list[int]]:
    """Devices that take part together, by their places in the flat mesh."""
    if match := re.search(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", attributes):
        return _braced(match[1])
    match = re.search(r"replica_groups=(\{(?:\{[\d,]*\},?)*\}|mesh\[|\[)", attributes)
    if match is None:
        raise ValueError(f"no devices are named in {attributes[:200]!r}")
    rest = attributes[match.start(1) :]
    if match[1].startswith("{"):
        return _braced(match[1][1:-1]) or [list(range(devices))]
    if match[1] == "[":
        return _iota(rest)
    return _of_mesh(rest)


def _braced(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(text: str) -> list[list[int]]:
    """Groups as in "[4,2]<=[2,4]T(1,0)": the numbers 0.. in a box, transposed, cut into rows."""
    match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"groups of devices are written in an unknown way: {text[:120]!r}")
    groups, box = _ints(match[1]), _ints(match[2])
    ids = np.arange(math.prod(box)).reshape(box)
    if match[3]:
        ids = ids.transpose(_ints(match[3]))
    return ids.reshape(groups).tolist()


def _of_mesh(text: str) -> list[list[int]]:
    """Groups as in "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": along some axes of a box of devices.

    An axis may be taken in part: 'b':(2)2 is the second factor 2 of b.
    """
    match = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)\)?)?\s*\{([^}]*)\}", text)
    if match is None:
        raise ValueError(f"groups of devices are written in an unknown way: {text[:120]!r}")
    box = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    ids = np.arange(math.prod(box.values()))
    if match[2]:
        if order := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", match[2]):
            ids = ids.reshape(_ints(order[1]))
            ids = ids.transpose(_ints(order[2])) if order[2] else ids
        else:
            ids = np.array(_ints(match[2]))
    # Every axis in three factors: before, the part taken, after.
    factors: list[int] = []
    taken: list[int] = []
    chosen = {n: (p, s) for n, p, s in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])}
    for name, size in box.items():
        before, part = (int(n) if n else 0 for n in chosen.get(name, ("1", "1")))
        before, part = (before or 1), (part or size)
        taken.append(len(factors) + 1)
        factors += [before, part, size // (before * part)]
    ids = ids.reshape(factors)
    return (
        np.moveaxis(ids, taken, range(-len(taken), 0))
        .reshape(-1, math.prod(factors[t] for t in taken))
        .tolist()
    )


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)

"""Bytes that a compiled TPU program moves to and from main memory, counted from the program itself.

Counted are every instruction's operand and result buffers in main memory (not those the compiler placed in
fast memory), as tiled; of an operand that a fusion only slices, the slices; a loop's body times its trips. A
Pallas call fetches a block whenever the grid's next step needs another one than the step before it: its index
maps say how often. Declared cost estimates are not looked at. ``benchmarks/mamba2_bytes.py`` is a use of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

BITS = {"pred": 8, "bf16": 16, "f16": 16, "token": 0}
# What moves nothing itself: names for buffers, and the ends of copies counted where they start.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
FREE |= {"copy-done", "slice-done", "async-done", "custom-call-done", "opt-barrier"}
LITERAL = {"parameter", "constant"}  # their attributes here are what stands in parentheses
SLICES = {"slice", "dynamic-slice", "gather"}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%(\S+) = (.*)$")


class Instruction(NamedTuple):
    """One line of HLO. ``shape`` is its text, ``operands`` the names of other instructions."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


class Call(NamedTuple):
    """A Pallas call: what its operands and results move, and their shapes, in order."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: tuple[int, ...]


class Row(NamedTuple):
    """What one instruction moves in all its executions."""

    name: str
    opcode: str
    bytes: int


def count(function: Callable, text: str, *args) -> list[Row]:
    """What the program ``text``, ``as_text()`` of the compiled ``function(*args)``, moves; most first.

    Raises:
        ValueError: a Pallas call of the program that the trace of ``function`` does not have.
    """
    calls = list(pallas_calls(jax.make_jaxpr(function)(*args).jaxpr))
    computations = parse(text)
    rows = _rows(computations, computations["ENTRY"], calls, 1)
    return sorted(rows, key=lambda row: -row.bytes)


def buffer_bytes(shape: str) -> int:
    """Bytes in main memory of an HLO shape, or tuple of shapes, with its padding to whole tiles."""
    total = 0
    for dtype, sizes, order, layout in _ARRAY.findall(shape):
        if "S(" in layout:
            continue
        dims = [int(n) for n in sizes.split(",") if n]
        minor_first = [dims[int(axis)] for axis in order.split(",") if axis]
        tile = re.search(r"T\(([\d,]+)\)", layout)
        for i, n in enumerate(reversed([int(n) for n in tile[1].split(",")]) if tile else ()):
            if i < len(minor_first):
                minor_first[i] = -(-minor_first[i] // n) * n
        bits = BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
        total += math.prod(minor_first) * bits // 8
    return total


def parse(text: str) -> dict[str, list[Instruction]]:
    """Computations by name; the entry under "ENTRY"."""
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            name = "ENTRY" if line.startswith("ENTRY") else line[1:].split(" ")[0]
            computations[name] = []
        elif match := _INSTRUCTION.match(line):
            computations[name].append(_instruction(bool(match[1]), match[2], match[3]))
    return computations


def _instruction(root: bool, name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    start = rest.index("(")
    stop = _closing(rest, start)
    operands = tuple(re.findall(r"%([^\s,()]+)", rest[start : stop + 1]))
    opcode = rest[:start]
    attributes = rest[start + 1 : stop] if opcode in LITERAL else rest[stop + 1 :]
    return Instruction(name, shape, opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


def _rows(computations, body: list[Instruction], calls: Sequence[Call], times: int) -> Iterator[Row]:
    shapes = {i.name: i.shape for i in body}
    for i in body:
        if i.opcode in FREE or "AllocateBuffer" in i.attributes:
            continue
        if i.opcode == "while":
            trips = _trips(computations[_called(i, "condition")])
            yield from _rows(computations, computations[_called(i, "body")], calls, times * trips)
        elif i.opcode == "call":
            yield from _rows(computations, computations[_called(i, "to_apply")], calls, times)
        else:
            yield Row(i.name, i.opcode, times * _moved(i, shapes, computations, calls))


def _trips(condition: list[Instruction]) -> int:
    """Of a loop that counts from 0 by 1, as scans do."""
    limits = [int(i.attributes) for i in condition if i.opcode == "constant" and i.attributes.isdigit()]
    if len(limits) != 1:
        raise ValueError(f"a loop without one constant limit: {[i.name for i in condition]}")
    return limits[0]


def _called(i: Instruction, key: str) -> str:
    return re.search(rf"{key}=%([^\s,]+)", i.attributes)[1]  # type: ignore[index]


def _moved(i: Instruction, shapes: Mapping[str, str], computations, calls: Sequence[Call]) -> int:
    operands = [shapes[name] for name in i.operands]
    if i.opcode == "fusion":
        return _moved_by_fusion(operands, i, computations)
    if i.opcode == "custom-call" and "tpu_custom_call" in i.attributes:
        return _moved_by_pallas(i, operands, calls)
    if i.opcode == "copy-start":  # (destination, source, context)
        return sum(map(buffer_bytes, _arrays(i.shape)[:2]))
    if i.opcode == "slice-start":  # ((source), destination, context): as much is read as arrives
        return buffer_bytes(re.sub(r"S\(\d\)", "", _arrays(i.shape)[1]))
    if i.opcode in SLICES:
        return 2 * buffer_bytes(i.shape)
    if i.opcode == "dynamic-update-slice":
        return 2 * buffer_bytes(operands[1])
    return sum(map(buffer_bytes, operands)) + buffer_bytes(i.shape)


def _arrays(shape: str) -> list[str]:
    return [match[0] for match in _ARRAY.finditer(shape)]


def _moved_by_fusion(operands: list[str], i: Instruction, computations) -> int:
    """An operand that is only sliced counts as its slices, a result updated in place as the update."""
    body = computations[_called(i, "calls")]
    updates = {_elements(shape): update for shape, update in _updates(body, computations)}
    total = 0
    for array in _arrays(i.shape):
        written = buffer_bytes(array)
        total += min(written, updates.get(_elements(array), written))
    for parameter in body:
        if parameter.opcode == "parameter":
            whole = buffer_bytes(operands[int(parameter.attributes)])
            total += _read(parameter, whole, body, computations)
    return total


def _elements(shape: str) -> int:
    return math.prod(int(n) for n in _ARRAY.findall(shape)[0][1].split(",") if n)


def _updates(body: list[Instruction], computations) -> Iterator[tuple[str, int]]:
    """Shape and bytes of the update of every update in place."""
    shapes = {i.name: i.shape for i in body}
    for i in body:
        if i.opcode == "dynamic-update-slice":
            yield i.shape, buffer_bytes(shapes[i.operands[1]])
        elif i.opcode == "fusion":
            yield from _updates(computations[_called(i, "calls")], computations)


def _read(value: Instruction, whole: int, body: list[Instruction], computations) -> int:
    """Bytes of a fusion's operand that the fusion reads, ``whole`` at most."""
    total = whole if value.root else 0
    for user in (i for i in body if value.name in i.operands):
        first = user.operands[0] == value.name
        if user.opcode in SLICES and first:
            total += buffer_bytes(user.shape)
        elif user.opcode == "bitcast":
            total += _read(user, whole, body, computations)
        elif user.opcode == "fusion":
            inner = computations[_called(user, "calls")]
            numbers = {str(n) for n, name in enumerate(user.operands) if name == value.name}
            for i in inner:
                if i.opcode == "parameter" and i.attributes in numbers:
                    total += _read(i, whole, inner, computations)
        elif not (user.opcode == "dynamic-update-slice" and first):
            return whole
    return min(total, whole)


def _moved_by_pallas(i: Instruction, operands: list[str], calls: Sequence[Call]) -> int:
    buffers = operands + _arrays(i.shape)
    sizes = tuple(tuple(int(n) for n in _ARRAY.match(b)[2].split(",") if n) for b in buffers)  # type: ignore[index]
    for call in calls:
        if call.name in i.name and call.shapes == sizes:
            return sum(n for n, buffer in zip(call.bytes, buffers) if "S(" not in buffer)
    raise ValueError(f"the Pallas call {i.name} with buffers {sizes} is not in the trace")


def pallas_calls(jaxpr) -> Iterator[Call]:
    """Every Pallas call of a jaxpr, those inside of other calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield _call(equation)
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from pallas_calls(getattr(value, "jaxpr", value))


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def _call(equation) -> Call:
    mapping = equation.params["grid_mapping"]
    grid = np.stack(np.meshgrid(*map(np.arange, mapping.grid), indexing="ij"), -1).reshape(
        -1, len(mapping.grid)
    )
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    tables = mapping.num_index_operands  # fetched whole
    blocks = zip(mapping.block_mappings, avals[tables:], strict=True)
    moved = [math.prod(aval.shape) * aval.dtype.itemsize for aval in avals[:tables]]
    moved += [_fetched(block, grid, aval) for block, aval in blocks]
    return Call(equation.params["name"], tuple(aval.shape for aval in avals), tuple(moved))


def _fetched(block, grid: np.ndarray, aval) -> int:
    """Bytes of a block times how often it changes along the grid, its first fetch included.

    Index maps that read a table of a call are not known here, and fail.
    """
    index_map = block.index_map_jaxpr
    tables = [None] * (len(index_map.jaxpr.invars) - grid.shape[1])

    def index(point):
        return jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *point, *tables)

    columns = [np.broadcast_to(t, len(grid)) for t in map(np.asarray, jax.vmap(index)(grid.astype(np.int32)))]
    changed = [column[1:] != column[:-1] for column in columns]
    changes = 1 + int(np.any(changed, axis=0).sum())
    sizes = (getattr(n, "block_size", 1) for n in block.block_shape)  # a squeezed axis has none
    return changes * math.prod(sizes) * aval.dtype.itemsize

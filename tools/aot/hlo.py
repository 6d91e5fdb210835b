"""The text of a compiled program: which instructions run, how often, and from which line."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.hlo_bytes import Instruction, parse

Computations = Mapping[str, Sequence[Instruction]]
ROOT = pathlib.Path(__file__).resolve().parents[2]
BITS = {"pred": 8, "bf16": 16, "f16": 16, "token": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_PASSED = {
    "get-tuple-element",
    "bitcast",
    "copy",
    "copy-done",
    "copy-start",
    "convert",
    "reshape",
    "transpose",
}
_ROW = re.compile(r"^(\d+) (.*)$")


@dataclasses.dataclass(frozen=True)
class Frame:
    """A place in this repository: file relative to it, function, line."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction that runs.

    Attributes:
        times: in one run of the program; of a loop whose trips are not known, one pass counts.
        counted: whether all loops around it have known trips.
        computation: that it stands in.
        caller: the fusion that it stands in, if it does.
    """

    instruction: Instruction
    times: int
    counted: bool
    computation: str
    caller: Instruction | None


class Program:
    """The parsed text of ``compiled.as_text()``."""

    def __init__(self, text: str):
        self.computations: Computations = parse(text)
        self._frames = _frames(text)

    def executed(self) -> Iterator[Executed]:
        """Every instruction reached from the entry, those inside fusions too."""
        yield from self._walk("ENTRY", 1, True, None)

    def _walk(self, name: str, times: int, counted: bool, caller: Instruction | None) -> Iterator[Executed]:
        for i in self.computations[name]:
            yield Executed(i, times, counted, name, caller)
            if i.opcode == "while":
                trips = _trips(self.computations[_names(i, "condition")[0]])
                body = _names(i, "body")[0]
                yield from self._walk(body, times * (trips or 1), counted and trips is not None, caller)
            elif i.opcode in ("call", "conditional", "fusion", "async-start"):
                keys = ("calls", "to_apply", "branch_computations", "true_computation", "false_computation")
                inside = i if i.opcode == "fusion" else caller
                for called in (c for key in keys for c in _names(i, key)):
                    yield from self._walk(called, times, counted, inside)

    def origin(self, computation: str, name: str) -> Instruction | None:
        """What computed a value, through copies, tuples and fusions; None where it comes from outside."""
        there = {i.name: i for i in self.computations[computation]}
        i, index = there.get(name), None
        while i is not None and i.opcode in _PASSED and i.operands:
            if i.opcode == "get-tuple-element":
                index = int(re.search(r"index=(\d+)", i.attributes)[1])  # type: ignore[index]
            i = there.get(i.operands[0])
        if i is None or i.opcode != "fusion" or index is None:
            return i
        called = _names(i, "calls")[0]
        root = next(t for t in self.computations[called] if t.root)
        inner = self.origin(called, root.operands[index]) if root.opcode == "tuple" else None
        return inner if inner is not None and self.frames(inner) else i

    def frames(self, i: Instruction) -> tuple[Frame, ...]:
        """Where in this repository an instruction comes from, the innermost call last."""
        match = re.search(r"stack_frame_id=(\d+)", i.attributes)
        return self._frames.get(int(match[1]), ()) if match else ()


def op_name(i: Instruction) -> str:
    """The path of jax's transformations and primitives, as in "jit(step)/jvp()/dot_general"."""
    match = re.search(r'op_name="([^"]*)"', i.attributes)
    return match[1] if match else ""


def shapes(text: str) -> list[tuple[tuple[int, ...], int]]:
    """(sizes, bytes without padding) of every array in the text of an HLO shape."""
    found = []
    for dtype, sizes in _ARRAY.findall(text):
        dims = tuple(int(n) for n in sizes.split(",") if n)
        bits = BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d*).*$", r"\1", dtype) or 0)
        count = 1
        for n in dims:
            count *= n
        found.append((dims, count * bits // 8))
    return found


def _names(i: Instruction, key: str) -> list[str]:
    """Computations that an attribute names: one, or several in braces."""
    match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[^\s,]+)", i.attributes)
    return re.findall(r"%([^\s,{}]+)", match[1]) if match else []


def _trips(condition: Sequence[Instruction]) -> int | None:
    """Of a loop that counts up by one from 0 to the only number in its condition, as scans do; else None."""
    limits = [int(i.attributes.split(")")[0]) for i in condition if _is_number(i)]
    return limits[0] if len(limits) == 1 else None


def _is_number(i: Instruction) -> bool:
    return i.opcode == "constant" and i.attributes.split(")")[0].isdigit()


def _frames(text: str) -> dict[int, tuple[Frame, ...]]:
    """Calls by the id of their innermost frame; what lies outside this repository is left out."""
    head = text[: text.find("\n%")]
    names = {n: row.strip('"') for n, row in _table(head, "FileNames")}
    functions = {n: row.strip('"') for n, row in _table(head, "FunctionNames")}
    places = {n: _numbers(row) for n, row in _table(head, "FileLocations")}
    rows = {n: _numbers(row) for n, row in _table(head, "StackFrames")}
    # Parents come before their children. Some versions write the parent's id, others one more.
    more = 1 if any(row.get("parent_frame_id") == n for n, row in rows.items()) else 0
    found: dict[int, tuple[Frame, ...]] = {0: ()}
    for n, row in sorted(rows.items()):
        place = places[row["file_location_id"]]
        before = found.get(row.get("parent_frame_id", more) - more, ())
        path = pathlib.Path(names[place["file_name_id"]])
        file = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "."
        if not file.startswith("."):  # an environment may lie in the clone, as .venv
            before = (*before, Frame(file, functions[place["function_name_id"]], place.get("line", 0)))
        found[n] = before
    return found


def _table(head: str, name: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the rows under a heading."""
    _, _, rest = head.partition(f"\n{name}\n")
    for line in rest.splitlines():
        match = _ROW.match(line)
        if not match:
            return
        yield int(match[1]), match[2]


def _numbers(row: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}

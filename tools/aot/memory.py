"""What a program needs of a device's main memory, and whether a chip has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.hlo_bytes import buffer_bytes
from tools.aot.hlo import Program, op_name
from tools.aot.programs import Compiled, OutOfMemory, device_bytes
from tools.aot.topologies import GIB

# Names for buffers that exist already, and what moves between memories.
_NO_BUFFER = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
_NO_BUFFER |= {"constant", "optimization-barrier", "after-all", "partition-id", "copy-done", "async-done"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        parts: of the arguments by name, "parameters" and the like, as arrays are.
        padding: what the arguments take beyond that, in whole tiles.
        temporary: activations, gradients and whatever else lives while the program runs.
        results: beside those that are written over arguments.
        code: the program itself.
    """

    parts: dict[str, int]
    padding: int
    temporary: int
    results: int
    code: int

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + self.padding + self.temporary + self.results + self.code

    @property
    def shares(self) -> dict[str, int]:
        """All of it by name, the largest first."""
        other = {
            "padding of arguments": self.padding,
            "temporary": self.temporary,
            "results": self.results,
            "code": self.code,
        }
        return dict(sorted((self.parts | other).items(), key=lambda share: -share[1]))


def of_compiled(compiled: Compiled) -> Memory:
    """As XLA assigned it."""
    stats: Any = compiled.executable.memory_analysis()
    parts = arguments(compiled.program.parts)
    return Memory(
        parts=parts,
        padding=max(stats.argument_size_in_bytes - sum(parts.values()), 0),
        temporary=stats.temp_size_in_bytes,
        results=max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
        code=stats.generated_code_size_in_bytes,
    )


def of_refused(parts: dict[str, Any], error: OutOfMemory) -> Memory:
    """What is known of a program that was refused: the compiler tells of temporaries only, or of all."""
    known = arguments(parts)
    told = error.needed if "temporaries" in str(error) else max(error.needed - sum(known.values()), 0)
    return Memory(parts=known, padding=0, temporary=told, results=0, code=0)


def arguments(parts: dict[str, Any]) -> dict[str, int]:
    """Bytes of one device by the name of the part."""
    return {name: device_bytes(tree) for name, tree in parts.items()}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value that the program computes into main memory, padded to whole tiles."""

    bytes: int
    shape: str
    name: str
    op_name: str
    where: str


def largest(program: Program, count: int = 10) -> list[Buffer]:
    """The largest values, each once; not all of them live at the same time."""
    found: dict[tuple[str, str], Buffer] = {}
    for executed in program.executed():
        i = executed.instruction
        if executed.caller is not None or i.opcode in _NO_BUFFER:
            continue
        frames = program.frames(i)
        size, shape = buffer_bytes(i.shape), i.shape.partition("{")[0]
        buffer = Buffer(size, shape, i.name, op_name(i), str(frames[-1]) if frames else "")
        found.setdefault((shape, buffer.where), buffer)
    return sorted(found.values(), key=lambda b: -b.bytes)[:count]


def verdict(memory: Memory, available: int, advice: Sequence[str]) -> str:
    """One sentence: "fits, 3.2 GiB free of 15.75 GiB", or by how much it does not, why, and what to try."""
    if memory.total <= available:
        return f"fits, {gib(available - memory.total)} free of {gib(available)}"
    name, size = next(iter(memory.shares.items()))
    return (
        f"does not fit: needs {gib(memory.total)}, has {gib(available)}, {gib(memory.total - available)} too "
        f"much; the largest share is {name}, {gib(size)}; try {'; or '.join(advice)}"
    )


def gib(size: float) -> str:
    """As "3.21 GiB"; in MiB where that is less than a tenth."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def advise(memory: Memory, config: Any, mesh: dict[str, int]) -> list[str]:
    """Settings that make the largest shares smaller, those that cost least first."""
    tips = []
    static = sum(memory.parts.values())
    if mesh["data"] > 1 and static > memory.total / 4:  # gradients, as large as parameters, are temporary
        tips.append(f"--config.mesh.data=1 --config.mesh.fsdp={mesh['data'] * mesh['fsdp']}")
    remat = getattr(config.model, "remat", None)
    if memory.temporary >= static and remat in ("none", "dots"):
        tips.append(f"--config.model.remat={'dots' if remat == 'none' else 'full'}")
    rows = config.task.batch_size // (mesh["data"] * mesh["fsdp"])
    more = config.optim.accumulation * 2
    if memory.temporary >= static and rows >= more and rows % more == 0:
        tips.append(f"--config.optim.accumulation={more}, half a microbatch")
    if rows > 1 or static > memory.temporary:
        tips.append("a larger mesh.fsdp, on more devices or in place of mesh.tensor and mesh.sequence")
    if memory.temporary >= static:
        tips.append(f"--config.mesh.sequence={mesh['sequence'] * 2}, half the tokens of a row on a device")
        tips.append(f"--config.task.batch_size={max(config.task.batch_size // 2, 1)}")
    tips.append("a topology with more chips, or chips with more memory; --suggest ranks what there is")
    return tips

"""What the TPU compiler says of a call on a machine that has no TPU: evidence, not a measurement.

Cycles of kernels in the compiled schedule (`benchmarks.static_cycles`), which know nothing of waiting for
memory; the VMEM that a kernel holds; and the bytes that pass to and from memory, counted from the buffers of
the compiled program (`benchmarks.hlo_bytes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from benchmarks import hlo_bytes, static_cycles
from benchmarks.chips import PEAKS
from benchmarks.ops.cases import BOTH, WHAT, Case, step
from pallas_kernels import tuning
from runtime import aot

KERNEL = "pallas_tpu"
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One implementation of a call, compiled for one chip. ``None``: not known.

    Attributes:
        what: "forward" or "forward and backward".
        cycles, kernel_ms: of the kernels, None where there are none.
        bytes, bytes_ms: of the whole program, and their time at the chip's bandwidth.
        vmem: the most that a kernel holds.
        error: the compiler's, or why the kernel does not take the call.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    chip: str
    what: str
    implementation: str
    cycles: int | None = None
    kernel_ms: float | None = None
    bytes: int | None = None
    bytes_ms: float | None = None
    vmem: int | None = None
    error: str = ""


def program(
    fields: dict[str, Any], implementation: str, what: str, target: str, forced: dict[str, int]
) -> tuple[Callable, tuple]:
    """For `static_cycles.measure`: a function and its described arguments.

    Args:
        fields: of a `Case`.
        target: the chip that block sizes are looked up for.
        forced: block sizes instead of those of the table; empty for those.
    """
    case = Case(**fields)
    function = step(lambda arrays: case.call(arrays, implementation), what)

    def traced(arrays: Any) -> Any:
        with tuning.chip(target), tuning.forced(case.op, forced) if forced else contextlib.nullcontext():
            return function(arrays)

    return traced, (case.described(),)


def evidence(case: Case, chip: str, implementation: str) -> list[Evidence]:
    """Of the forward alone and with the backward."""
    fields = (case.op, dict(case.shape), case.dtype, chip)
    found = []
    for what in WHAT:
        try:
            numbers: dict[str, Any] = {}
            if implementation == KERNEL:
                numbers["cycles"], numbers["kernel_ms"] = cycles(case, chip, what=what)
            numbers |= _compiled(case, chip, implementation, what)
            found.append(Evidence(*fields, what, implementation, **numbers))
        except (RuntimeError, ValueError) as error:
            found.append(Evidence(*fields, what, implementation, error=short(error)))
    return found


def cycles(
    case: Case, chip: str, forced: dict[str, int] | None = None, what: str = BOTH
) -> tuple[int, float]:
    """Cycles and milliseconds of the kernels of a call together, ``forced`` the block sizes to try.

    Raises:
        RuntimeError: it does not compile.
    """
    kernels = static_cycles.measure(
        "benchmarks.ops.static:program",
        chip,
        fields=dataclasses.asdict(case),
        implementation=KERNEL,
        what=what,
        target=chip,
        forced=forced or {},
    )
    return sum(k.cycles for k in kernels), sum(k.ms for k in kernels)


def least_ms(case: Case, chip: str, forced: dict[str, int], what: str) -> float:
    """The time that a call takes at least with these block sizes: its kernels' cycles, or all its bytes.

    Raises:
        RuntimeError: it does not compile.
    """
    _, kernels = cycles(case, chip, forced, what)
    return max(kernels, _compiled(case, chip, KERNEL, what, forced)["bytes_ms"])


def _compiled(
    case: Case, chip: str, implementation: str, what: str, forced: dict[str, int] | None = None
) -> dict[str, Any]:
    """Bytes and VMEM."""
    function, args = program(dataclasses.asdict(case), implementation, what, chip, forced or {})
    compiled = aot.compile_for(chip, function, *args)
    text = compiled.as_text() or ""
    lines = (line for line in text.splitlines() if '"tpu_custom_call"' in line)
    vmem = [int(size) for line in lines for size in _VMEM.findall(line)]
    moved = sum(row.bytes for row in hlo_bytes.count(function, text, *args))
    return {"bytes": moved, "bytes_ms": 1e3 * moved / PEAKS[chip].bytes, "vmem": max(vmem, default=None)}


def short(error: Exception) -> str:
    """The line of a compiler's message that says most."""
    lines = [line for line in str(error).splitlines() if line.strip() and "See http" not in line]
    lines = lines or [type(error).__name__]
    telling = [line for line in lines if re.search(r"Error|error|cannot|exceed|RESOURCE", line)]
    return (telling or lines)[-1].strip()[:300]

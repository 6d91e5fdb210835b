"""What a compiled TPU program moves, beside what it must: every argument and result once.

    python -m benchmarks.case_bytes --case=benchmarks.recurrence_cases:lti_ssm --chip=v5e backward=true

Compiled for a chip that need not be there; bytes as in ``benchmarks/hlo_bytes.py``. What stays in fast memory
from one instruction to the next is not moved, so a small call may move less than its arrays hold.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from benchmarks import hlo_bytes
from benchmarks.static_cycles import load
from runtime import aot


class Bytes(NamedTuple):
    """Of one case: what its program moves and by what (most first), what its arrays hold."""

    moved: int
    held: int
    rows: list[hlo_bytes.Row]
    kernels: bool  # of Pallas


def measure(case: str, chip: str, **arguments: Any) -> Bytes:
    """``case``: "module:function", which returns (f, args) for ``arguments``."""
    function, args = load(case)(**arguments)
    text = aot.compile_for(chip, function, *args).as_text()
    assert text is not None
    rows = hlo_bytes.count(function, text, *args)
    arrays = jax.tree.leaves((args, jax.eval_shape(function, *args)))
    held = sum(math.prod(t.shape) * t.dtype.itemsize for t in arrays)
    return Bytes(sum(row.bytes for row in rows), held, rows, "tpu_custom_call" in text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", required=True, help="module:function that returns (f, args)")
    parser.add_argument("--chip", default="v5e", choices=sorted(aot.TOPOLOGIES))
    parser.add_argument("arguments", nargs="*", help="name=JSON of the function")
    options = parser.parse_intermixed_args(argv)
    pairs = (argument.partition("=") for argument in options.arguments)
    found = measure(options.case, options.chip, **{name: json.loads(value) for name, _, value in pairs})
    ratio = found.moved / found.held
    print(f"{found.moved / 1e6:.1f} MB moved, {found.held / 1e6:.1f} MB held: {ratio:.2f} ({options.chip})")
    for row in found.rows[:8]:
        print(f"  {row.bytes / 1e6:10.1f} MB  {row.opcode:12} {row.name}")


if __name__ == "__main__":
    main()

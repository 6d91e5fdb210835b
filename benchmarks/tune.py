"""Block sizes of the kernels: ``python -m benchmarks.tune`` fills ``pallas_kernels/tuning.json``.

On a TPU or GPU every candidate runs and is timed. On a machine without one, candidates are compiled for TPU
and compared by what the compiler says (`benchmarks.ops.static`): the longer of the kernels' cycles and the
program's bytes. Each block size is varied in turn, the others at their best so far, for forward and backward
together. The table is written after every call: interrupt it, and run it again to go on. What stands in the
table is left, but a measurement replaces static evidence, never the other way round.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from benchmarks.chips import TPUS
from benchmarks.ops import static
from benchmarks.ops.cases import ACCELERATOR, ACCELERATOR_QUICK, BOTH, Case
from benchmarks.timing import measure
from pallas_kernels import tuning
from pallas_kernels.tuning import MEASURED, STATIC, Entry, Question
from runtime import aot

KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
Blocks = dict[str, int]
Time = Callable[[Case, Blocks], float]  # milliseconds; raises what the compiler raises


def candidates(question: Question) -> dict[str, list[int]]:
    """The values to try of each block size: halves and doubles of the default; of heads, divisors."""
    return {name: _values(question, name, size) for name, size in question.default.items()}


def _values(question: Question, name: str, size: int) -> list[int]:
    if name.startswith("heads"):
        heads = question.shape["H"] // question.shape.get("G", 1)
        return [n for n in range(2, 65) if heads % n == 0]
    return [n for n in (size // 2, size, 2 * size, 4 * size) if n % 128 == 0]


def search(case: Case, question: Question, time: Time, note: Callable[[str], None]) -> tuple[Blocks, float]:
    """The best block sizes found from the default on, and their milliseconds.

    Raises:
        RuntimeError: not even the default compiles.
    """
    best = dict(question.default)
    least = time(case, best)
    note(f"{case}: {best} {least:.4g} ms")
    for name, values in candidates(question).items():
        for sizes in [{**best, name: value} for value in values if value != best[name]]:
            try:
                ms = time(case, sizes)
            except (
                RuntimeError,
                ValueError,
            ) as error:  # too large for the chip's memory, or refused by the kernel
                note(f"{case}: {sizes} left out: {static.short(error)}")
                continue
            note(f"{case}: {sizes} {ms:.4g} ms")
            if ms < least:
                best, least = sizes, ms
    return best, least


def question_of(case: Case, chip: str) -> Question | None:
    """What the kernel of this call asks the table, None if the op has none or it asks nothing."""
    kernel = KERNELS[tuning.CHIPS[chip]]
    with tuning.chip(chip), tuning.questions() as asked:
        try:
            jax.jit(lambda arrays: case.call(arrays, kernel)).trace(case.described())
        except ValueError:
            return None
    return next((question for question in asked if question.op == case.op), None)


def static_time(chip: str) -> Time:
    """By the compiler's evidence for ``chip``."""

    def time(case: Case, blocks: Blocks) -> float:
        return static.least_ms(case, chip, blocks, BOTH)

    return time


def measured_time(chip: str) -> Time:
    """By running on the device at hand."""

    def time(case: Case, blocks: Blocks) -> float:
        function, _ = static.program(vars(case), KERNELS[tuning.CHIPS[chip]], BOTH, chip, blocks)
        arrays = jax.tree.map(jnp.asarray, case.arrays())
        compiled = jax.jit(function).lower(arrays).compile()
        return 1e3 * measure(lambda: compiled(arrays), repeats=7).median

    return time


def wanted(entries: Sequence[Entry], new: Entry, again: bool) -> bool:
    """Whether ``new`` may take the place of the entry for the same call, if there is one."""
    old = next((entry for entry in entries if entry.key == new.key), None)
    if old is None:
        return True
    if old.source == MEASURED and new.source == STATIC:
        return False
    return again or old.source != new.source


def fill(
    path: pathlib.Path,
    cases: Sequence[Case],
    chip: str,
    source: str,
    time: Time,
    again: bool,
    note: Callable[[str], None],
) -> list[Entry]:
    """Tune ``cases`` for ``chip``, writing the table at ``path`` after each; the entries that were made."""
    made = []
    for case in cases:
        if (question := question_of(case, chip)) is None:
            continue
        # Batch rows are independent: one entry serves any number.
        shape = {axis: size for axis, size in question.shape.items() if axis != "B"}
        today = datetime.date.today().isoformat()
        blank = Entry(chip, case.op, shape, question.dtype, question.default, source, today)
        if not wanted(_entries(path), blank, again):
            continue
        try:
            blocks, ms = search(case, question, time, note)
        except (RuntimeError, ValueError) as error:
            note(f"{case} for {chip}: not even the default blocks compile: {static.short(error)}")
            continue
        entry = Entry(chip, case.op, shape, question.dtype, blocks, source, today, round(ms, 4))
        others = [old for old in _entries(path) if old.key != entry.key]
        tuning.write([*others, entry], path)
        made.append(entry)
    return made


def _entries(path: pathlib.Path) -> tuple[Entry, ...]:
    return tuning.read(path) if path.exists() else ()


def main(argv: Sequence[str] | None = None) -> None:
    ops = sorted({case.op for case in ACCELERATOR})
    parser = argparse.ArgumentParser("python -m benchmarks.tune", allow_abbrev=False)
    add: Any = parser.add_argument
    add("--ops", default=",".join(ops), help="default %(default)s")
    add("--chips", default=",".join(TPUS), help="for static evidence, default %(default)s")
    add("--quick", action="store_true", help="the smaller shapes only")
    add("--again", action="store_true", help="also what was tuned before by the same method")
    add("--out", type=pathlib.Path, default=tuning.PATH, help="default pallas_kernels/tuning.json")
    given = parser.parse_args(argv)
    for flag, names, known in (("ops", given.ops, ops), ("chips", given.chips, TPUS)):
        if unknown := sorted(set(names.split(",")) - set(known)):
            parser.error(f"--{flag}: {unknown[0]!r} is unknown; use some of {','.join(known)}")
    console = Console()
    cases = [c for c in (ACCELERATOR_QUICK if given.quick else ACCELERATOR) if c.op in given.ops.split(",")]
    kind = jax.devices()[0].device_kind
    here = tuning.chip_of_kind(kind)
    if here is not None:
        runs = [(here, MEASURED, measured_time(here))]
    elif jax.default_backend() != "cpu":
        parser.error(f"the device {kind!r} is unknown: add it to KINDS in pallas_kernels/tuning.py")
    elif why := aot.unavailable():
        parser.error(f"no accelerator here, and nothing can be compiled for TPU: {why}")
    else:
        runs = [(chip, STATIC, static_time(chip)) for chip in given.chips.split(",")]
    note = lambda text: console.print(text, markup=False, highlight=False)  # noqa: E731
    for chip, source, time in runs:
        console.print(f"{chip}: {source}")
        for entry in fill(given.out, cases, chip, source, time, given.again, note):
            console.print(f"{entry}: {entry.blocks}, {entry.ms} ms ({source})", style="green")
    console.print(f"the table is {given.out}")


if __name__ == "__main__":
    main()

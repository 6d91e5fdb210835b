"""Cycles of TPU kernels without a TPU: the compiler's own schedule, counted.

The TPU compiler emits very long instruction words (bundles), one a cycle. Ahead-of-time compilation with its
dump flags writes the final schedule of every kernel; bundles times the trips of the loops around them is the
time the kernel takes when nothing stalls. Waiting for memory, launch cost and an uneven split over two cores
are not in it: a lower bound, good for ranking candidates, never a measurement. Every branch counts as taken;
what runs at one value of a grid index (the first step of a walk, the last) is also counted apart.

    python -m benchmarks.static_cycles --case=benchmarks.static_cases:ssd --chip=v5e heads=80 backward=true
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
BRANCH_DELAY = 4  # bundles after a branch that still run

BUNDLE = re.compile(r"\s*(0x[0-9a-f]+)\s+(LB:)?")
EXIT_TEST = re.compile(
    r"(%p\d+_p\d+) = scmp\.ge\.s32\.totalorder (?:\(!?%p\d+_p\d+\), )?%\S+, (\d+|%\S+)"  # perhaps predicated
)
BACK_EDGE = re.compile(r"sbr\.rel \(!(%p\d+_p\d+)\)")
# What runs only where an index has one value: jumped over where it has not.
UNEQUAL = re.compile(r"(%p\d+_p\d+) = scmp\.ne\.s32\.totalorder (?:\(!?%p\d+_p\d+\), )?%\S+, \d+")
JUMP = re.compile(r"sbr\.rel \((%p\d+_p\d+)\) target = \$region(\d+)")
LANDING = re.compile(r"region (\d+)\b")


@dataclasses.dataclass(frozen=True)
class KernelCycles:
    """One Pallas kernel of a compiled program.

    Attributes:
        name: of its HLO instruction ("ssd_fwd.1").
        cycles: of one core; where a chip has two, each runs its share of the "parallel" axis.
        bundles: in the body of the grid loop, inner loops counted once. trips: of the grid loop.
        unit_use: share of each unit's slots that are filled, weighted by trips ("VSTORE:SPILL" counts
            stores of registers that did not fit).
        unknown_loops: loops whose trip count is not a constant, counted as one trip.
        seldom: of ``cycles``, those behind a test that an index equals a number, which holds once a walk.
    """

    name: str
    chip: str
    cycles: int
    bundles: int
    trips: int
    unit_use: dict[str, float]
    unknown_loops: int = 0
    seldom: int = 0

    @property
    def ms(self) -> float:
        """Cycles over the chip's clock."""
        return self.cycles / CLOCK_HZ[self.chip] * 1e3

    @property
    def steady_ms(self) -> float:
        """Without what runs once a walk."""
        return (self.cycles - self.seldom) / CLOCK_HZ[self.chip] * 1e3


def measure(case: str, chip: str, **arguments: Any) -> list[KernelCycles]:
    """Cycles of every Pallas kernel in a program, compiled in a process of its own.

    Args:
        case: "module:function"; ``function(**arguments)`` returns (f, args) for ``aot.compile_for``.
        chip: "v5e", "v5p" or "v6e". arguments: what JSON can hold.

    Raises:
        RuntimeError: the program does not compile (the compiler's message), or holds no Pallas kernel.
    """
    with tempfile.TemporaryDirectory() as folder:  # some 40 MB
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache writes no schedule
            "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}",
        }
        command = [sys.executable, "-m", "benchmarks.static_cycles", "--only-compile"]
        command += [f"--case={case}", f"--chip={chip}"]
        command += [f"{name}={json.dumps(value)}" for name, value in arguments.items()]
        root = pathlib.Path(__file__).resolve().parents[1]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case} does not compile for {chip}: {done.stderr[-2000:]}")
        kernels = list(read_dump(pathlib.Path(folder), chip))
    if not kernels:
        raise RuntimeError(f"{case} compiled for {chip} holds no Pallas kernel.")
    return kernels


def read_dump(folder: pathlib.Path, chip: str) -> Iterator[KernelCycles]:
    """The kernels whose schedules a compilation wrote into ``folder``, in the order they were compiled."""
    for path in sorted(folder.glob("*-final_bundles.txt")):
        label = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
        if label is None or "schedule-analysis" in path.name:
            continue
        name = label[1]
        schedule = path.read_text()
        use = next(folder.glob(f"{path.name.split('-')[0]}-{name}-*final_hlo-static-per-bundle-*.txt"), None)
        if use is not None and re.search(r"exit bundle: %\S+ = custom-call\(", schedule):
            yield read_schedule(name, chip, schedule, use.read_text())


def read_schedule(name: str, chip: str, schedule: str, utilization: str) -> KernelCycles:
    """Count one kernel from the text of its schedule and of its table of unit use, one line a bundle."""
    count, loops = _bundles_and_loops(schedule)
    weight = [1] * count
    for first, last, trips in loops:
        for bundle in range(first, min(last + 1, count)):
            weight[bundle] *= trips or 1
    first, last, trips = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, count - 1, 1))
    return KernelCycles(
        name,
        chip,
        cycles=sum(weight),
        bundles=last + 1 - first,
        trips=trips or 1,
        unit_use=_unit_use(utilization, weight),
        unknown_loops=sum(trips is None for _, _, trips in loops),
        seldom=sum(weight[bundle] for bundle in _seldom(schedule, (last - first) // 2)),
    )


def _bundles_and_loops(schedule: str) -> tuple[int, list[tuple[int, int, int | None]]]:
    """Number of bundles, and (first bundle, last bundle, trips or None) of each loop."""
    bundle, opened, loops = 0, [], []
    exit_tests: dict[str, int | None] = {}
    for line in schedule.splitlines():
        if match := BUNDLE.match(line):
            bundle = int(match[1], 16)
            if match[2]:
                opened.append(bundle)
        for predicate, bound in EXIT_TEST.findall(line):
            exit_tests[predicate] = int(bound) if bound.isdigit() else None
        if (edge := BACK_EDGE.search(line)) and edge[1] in exit_tests and opened:
            loops.append((opened.pop(), bundle + BRANCH_DELAY, exit_tests[edge[1]]))
    return bundle + 1, loops


def _seldom(schedule: str, longest: int) -> set[int]:
    """Bundles that run only where an index has one value; a longer branch is a core's share of the grid."""
    bundle = 0
    unequal: set[str] = set()
    found: set[int] = set()
    jumps: dict[str, int] = {}  # by region, the first bundle that is jumped over
    for line in schedule.splitlines():
        if match := BUNDLE.match(line):
            bundle = int(match[1], 16)
        for region in LANDING.findall(line):
            start = jumps.pop(region, bundle)
            found |= set(range(start, bundle)) if bundle - start <= longest else set()
        unequal.update(match[1] for match in UNEQUAL.finditer(line))
        for predicate, region in JUMP.findall(line):
            if predicate in unequal:
                jumps[region] = bundle + BRANCH_DELAY + 1
    return found


def _unit_use(table: str, weight: list[int]) -> dict[str, float]:
    """Filled slots of each unit over its slots, bundles weighted by how often they run."""
    lines = table.splitlines()
    header = next(i for i, line in enumerate(lines) if "," in line)
    units = [unit.strip() for unit in lines[header].split(",")]
    rows = [[int(n) for n in line.split()] for line in lines[header + 1 :] if re.fullmatch(r"[\d\s]+", line)]
    rows = [row for row in rows if len(row) == len(units)]
    capacity, bundles = rows[0], rows[1:]
    total = sum(weight[: len(bundles)])
    filled = [sum(n * w for n, w in zip(column, weight)) for column in zip(*bundles)]
    return {unit: n / (total * slots) for unit, n, slots in zip(units, filled, capacity)}


def load(case: str) -> Callable[..., tuple[Callable, tuple]]:
    """The function named "module:function"."""
    module, _, function = case.partition(":")
    return getattr(importlib.import_module(module), function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", required=True, help="module:function that returns (f, args)")
    parser.add_argument("--chip", default="v5e", choices=sorted(CLOCK_HZ))
    parser.add_argument("--only-compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help="name=JSON of the function")
    options = parser.parse_intermixed_args()
    pairs = (argument.partition("=") for argument in options.arguments)
    arguments = {name: json.loads(value) for name, _, value in pairs}
    if options.only_compile:
        from runtime import aot

        function, args = load(options.case)(**arguments)
        aot.compile_for(options.chip, function, *args)
        return
    for kernel in measure(options.case, options.chip, **arguments):
        use = "  ".join(f"{unit} {share:.0%}" for unit, share in kernel.unit_use.items())
        print(f"{kernel.name}: {kernel.bundles} bundles x {kernel.trips} trips, {kernel.cycles} cycles = ")
        print(f"  {kernel.ms:.3f} ms on {kernel.chip} when nothing stalls (static, not measured)")
        print(f"  {kernel.steady_ms:.3f} ms without what runs once a walk\n  {use}")


if __name__ == "__main__":
    main()

"""Speed of the ops: ``python -m benchmarks.ops [--quick]``.

Every op, forward and with its gradients, on the device at hand: time to compile, steady state, and how far
that is from what the device allows, beside the reference, public JAX and torch. ``--against=COMMIT`` also
runs the ``xla`` implementations of an earlier commit (CPU only). On a machine without an accelerator, what
the TPU compiler says of the kernels stands below, as evidence and not as a measurement. Prints tables; writes
JSON and a picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from benchmarks import machine
from benchmarks.chips import TPUS, Peak, peak_of_kind
from benchmarks.ops import against, report, static
from benchmarks.ops.cases import ACCELERATOR, ACCELERATOR_QUICK, OPS
from benchmarks.ops.run import XLA, Found, Plan, run
from benchmarks.results_file import write
from pallas_kernels.examples import examples
from runtime import aot


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Raises:
        SystemExit: an unknown op, chip or commit.
    """
    parser = argparse.ArgumentParser("python -m benchmarks.ops", allow_abbrev=False)
    add = parser.add_argument
    add("--ops", default="", help=f"some of {','.join(OPS)} (default all)")
    add("--quick", action="store_true", help="about two minutes: few, small calls, one chip")
    add("--against", help="commit whose xla implementations run too")
    add("--repeats", type=int, help="samples (default 7; 3 if --quick)")
    add("--chips", help=f"for static evidence: {','.join(TPUS)} or none (default all; v5e if --quick)")
    add("--no_peers", action="store_true", help="only this repository")
    add("--out", help="JSON file (default benchmarks/results/ops_DATE_MACHINE.json), picture beside it")
    given = parser.parse_args(argv)
    given.ops = given.ops.split(",") if given.ops else []
    if unknown := sorted(set(given.ops) - set(OPS)):
        parser.error(f"--ops: {unknown[0]!r} is unknown; use some of {','.join(OPS)}")
    given.chips = (given.chips or ("v5e" if given.quick else ",".join(TPUS))).split(",")
    if given.chips == ["none"]:
        given.chips = []
    if unknown := sorted(set(given.chips) - set(TPUS)):
        parser.error(f"--chips: {unknown[0]!r} is unknown; use some of {','.join(TPUS)}, or none")
    if given.against is not None:
        try:
            given.against = against.resolve(given.against)
        except ValueError as error:
            parser.error(str(error))
    return given


def gather(chips: Sequence[str], ops: Sequence[str], quick: bool, note) -> list[static.Evidence]:
    """Static evidence of every kernel for TPU, and of xla beside it."""
    kernels = {e.op for e in examples() if static.KERNEL in e.available}
    cases = [c for c in (ACCELERATOR_QUICK if quick else ACCELERATOR) if not ops or c.op in ops]
    found = []
    for case in cases:
        for chip in chips:
            for name in (static.KERNEL, XLA) if case.op in kernels else (XLA,):
                note(f"{case}: compiling {name} for {chip}")
                found += static.evidence(case, chip, name)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    given, console, described = options(argv), Console(), machine.describe()
    plan = Plan(given.ops, given.quick, given.repeats or (3 if given.quick else 7), given.against)
    plan = Plan(**{**vars(plan), "peers": not given.no_peers})
    with console.status("starting") as status:
        found = run(plan, note=status.update)
        peak = _peak(found)
        why = "there is an accelerator" if found.platform != "cpu" else aot.unavailable()
        evidence = [] if why else gather(given.chips, given.ops, given.quick, status.update)
    results = report.results(plan, found, described, peak, evidence)
    report.show(results, console)
    if why and given.chips:
        console.print(f"no static evidence for TPU: {why}")
    path = write(results, given.out)
    report.plot(results, path.with_suffix(".png"))
    console.print(f"written to {path} and {path.with_suffix('.png')}")


def _peak(found: Found) -> Peak | None:
    if found.platform == "cpu":
        return Peak(machine.matmul_rate(), machine.copy_rate())
    return peak_of_kind(found.kind)


if __name__ == "__main__":
    main()

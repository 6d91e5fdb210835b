"""How fast the ops can be, and how far the kernels are from it: ``python -m benchmarks.roofline``.

For every op at the shapes of published models: FLOPs, bytes, and the time each chip needs at least, by the
peaks of its data sheet. Beside them what the TPU compiler says of our kernels and of XLA's programs on a
machine without a TPU (`benchmarks.ops.static`): evidence, not a measurement. Prints tables; writes JSON and a
picture.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.chips import PEAKS, TPUS
from benchmarks.ops import report, static
from benchmarks.ops.__main__ import gather
from benchmarks.ops.cases import ACCELERATOR, ACCELERATOR_QUICK, FORWARD, WHAT, Case
from benchmarks.results_file import write
from runtime import aot

Row = dict[str, Any]


def bounds(cases: Sequence[Case]) -> list[Row]:
    """For each call forward, and with its gradients: FLOPs, bytes, and milliseconds by chip."""
    rows = []
    for case in cases:
        for what in WHAT:
            work = case.work(what)
            by_chip = {chip: peak.bound(work) for chip, peak in PEAKS.items()}
            rows.append(
                {"op": case.op, "shape": dict(case.shape), "dtype": case.dtype, "what": what}
                | {"flops": work.flops, "bytes": work.bytes}
                | {"ms": {chip: 1e3 * b.seconds for chip, b in by_chip.items()}}
                | {"by": {chip: b.by for chip, b in by_chip.items()}}
            )
    return rows


def bounds_table(rows: Sequence[Row]) -> Table:
    """One call a row, milliseconds with M (memory) or C (compute) for each chip."""
    table = Table(title="Least milliseconds", title_justify="left", title_style="bold")
    for i, name in enumerate(("", "GFLOP", "MB", "FLOP/B", *PEAKS)):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        cells = [f"{row['ms'][chip]:.3f} {row['by'][chip][0].upper()}" for chip in PEAKS]
        name = f"{Case(row['op'], row['shape'], row['dtype'])}, {row['what']}"
        intensity = row["flops"] / row["bytes"]
        totals = (row["flops"] / 1e9, row["bytes"] / 1e6, intensity)
        table.add_row(name, *(f"{total:.4g}" for total in totals), *cells)
    return table


def plot(found: Row, path: pathlib.Path) -> None:
    """Left the rooflines with every call on its chip's; right the static evidence over the bound."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (roofs, bars) = plt.subplots(1, 2, figsize=(16, 7), width_ratios=(2, 3), layout="constrained")
    intensities = np.geomspace(0.1, 4000, 200)
    for i, (chip, peak) in enumerate(PEAKS.items()):
        roof = np.minimum(peak.flops, intensities * peak.bytes) / 1e12
        roofs.plot(intensities, roof, color=f"C{i}", label=chip, linewidth=1)
    markers = dict(zip(dict.fromkeys(row["op"] for row in found["bounds"]), "os^vD*P"))
    for row in found["bounds"]:
        x, filled = row["flops"] / row["bytes"], row["what"] == FORWARD
        y = min(PEAKS["v5e"].flops, x * PEAKS["v5e"].bytes) / 1e12
        face = "black" if filled else "none"
        roofs.plot(x, y, markers[row["op"]], markersize=6, color="black", markerfacecolor=face)
    for op, marker in markers.items():
        roofs.plot([], [], marker, color="black", label=op)
    roofs.set(xscale="log", yscale="log", xlabel="FLOP/byte", ylabel="TFLOP/s")
    roofs.set_title("rooflines; calls on that of v5e, hollow with gradients", fontsize=10)
    roofs.legend(fontsize=8)
    _bars(bars, found["static"])
    figure.suptitle(f"bounds by data sheet; compiled for TPU, not run ({found['machine']['date'][:10]})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(panel: Any, rows: Sequence[Row]) -> None:
    """Least time of each compiled program over the bound of its call."""
    known = [row for row in rows if row["bytes_ms"] is not None]
    labels = list(dict.fromkeys(_label(row) for row in known))
    kinds = list(dict.fromkeys(row["implementation"] for row in known))
    for i, kind in enumerate(kinds):
        mine = {
            _label(r): max(r["kernel_ms"] or 0, r["bytes_ms"]) / r["bound_ms"]
            for r in known
            if r["implementation"] == kind
        }
        places = [labels.index(label) + 0.8 * (i / len(kinds) - 0.5) for label in mine]
        name = "our kernels" if kind == static.KERNEL else kind
        panel.barh(places, list(mine.values()), 0.8 / len(kinds), align="edge", label=name, color=f"C{i}")
    panel.set_yticks(range(len(labels)), labels, fontsize=7)
    panel.invert_yaxis()
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set(xscale="log", xlabel="least time of the compiled program / bound")
    panel.set_title(
        "kernels: the longer of cycles and bytes; xla: bytes alone, its cycles are not known", fontsize=10
    )
    if known:
        panel.legend(fontsize=8)


def _label(row: Row) -> str:
    shape = " ".join(f"{axis}={size}" for axis, size in row["shape"].items() if axis not in "BQ")
    return f"{row['op']} {shape}{'' if row['what'] == FORWARD else ' +grad'}, {row['chip']}"


def main(argv: Sequence[str] | None = None) -> None:
    ops = sorted({case.op for case in ACCELERATOR})
    parser = argparse.ArgumentParser("python -m benchmarks.roofline", allow_abbrev=False)
    add: Any = parser.add_argument
    add("--ops", default=",".join(ops), help="default %(default)s")
    add("--chips", default=",".join(TPUS), help="to compile for, or none; default %(default)s")
    add("--quick", action="store_true", help="the smaller shapes only")
    add("--out", help="JSON file (default benchmarks/results/roofline_DATE_MACHINE.json), picture beside it")
    given = parser.parse_args(argv)
    chips = [] if given.chips == "none" else given.chips.split(",")
    for flag, names, known in (("ops", given.ops.split(","), ops), ("chips", chips, list(TPUS))):
        if unknown := sorted(set(names) - set(known)):
            parser.error(f"--{flag}: {unknown[0]!r} is unknown; use some of {','.join(known)}")
    chosen, console = given.ops.split(","), Console()
    rows = bounds([c for c in (ACCELERATOR_QUICK if given.quick else ACCELERATOR) if c.op in chosen])
    console.print(bounds_table(rows))
    if chips and (why := aot.unavailable()):
        console.print(f"no static evidence: {why}")
        chips = []
    with console.status("") as status:
        evidence = gather(chips, chosen, given.quick, status.update)
    found: Row = {
        "benchmark": "roofline",
        "machine": machine.describe(),
        "method": report.STATIC,
        "bounds": rows,
        "static": [report.with_bound(e) for e in evidence],
    }
    if evidence:
        console.print(report.STATIC)
        console.print(report.static_table(found["static"]))
    path = write(found, given.out)
    plot(found, path.with_suffix(".png"))
    console.print(f"written to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()

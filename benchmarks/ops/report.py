"""The results of ``benchmarks.ops`` as a dict for JSON, as tables on a terminal and as a picture."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chips import PEAKS, Peak
from benchmarks.ops.cases import FORWARD, Case
from benchmarks.ops.run import REFERENCE, XLA, Found, Plan
from benchmarks.ops.static import Evidence
from benchmarks.tables import seconds

METHOD = (
    "Calls of the ops from the same numbers, compiled ahead; everyone waits for the result of every call. "
    "One process a framework; samples in turns, medians. The bound is the larger of FLOPs at the matmul "
    "rate and of bytes (every input and output once; backward also inputs again, cotangents, gradients) "
    "at the copy rate."
)
ON_CPU = "Both rates were measured on this CPU in this run; what fits its caches can beat the bound."
STATIC = (
    "TPU: the compiler's evidence, nothing was run. Kernels: cycles of the compiled schedule, without "
    "waiting for memory. Bytes: of the compiled program's buffers to and from memory, at the chip's "
    "bandwidth. The program takes at least the longer of the two."
)
Row = dict[str, Any]


def results(plan: Plan, found: Found, machine: Row, peak: Peak | None, evidence: Sequence[Evidence]) -> Row:
    """Everything as plain values."""
    records = []
    for r in found.records:
        work = Case(r.op, r.shape, r.dtype).work(r.what)
        bound = peak.bound(work) if peak else None
        records.append(
            dataclasses.asdict(r)
            | {"median": r.median, "cpu_median": statistics.median(r.cpu_samples)}
            | {"flops": work.flops, "bytes": work.bytes}
            | {"bound_seconds": bound and bound.seconds, "bound_by": bound and bound.by}
            | {"of_roofline": bound and bound.seconds / r.median}
        )
    return {
        "benchmark": "ops",
        "method": METHOD,
        "machine": machine,
        "device": {"platform": found.platform, "kind": found.kind},
        "peak": peak and dataclasses.asdict(peak),
        "plan": dataclasses.asdict(plan),
        "records": records,
        "left_out": found.left_out,
        "static": [with_bound(e) for e in evidence],
        "targets": targets(records),
    }


def with_bound(e: Evidence) -> Row:
    """The record with the least time that the chip allows, and by what."""
    bound = PEAKS[e.chip].bound(Case(e.op, e.shape, e.dtype).work(e.what))
    return dataclasses.asdict(e) | {"bound_ms": 1e3 * bound.seconds, "bound_by": bound.by}


def targets(records: Sequence[Row]) -> list[Row]:
    """Times of xla over those of what it must not be slower than: the commit before, associative_scan."""
    made = []
    for ours in (r for r in records if r["who"] == XLA):
        for other in (r for r in records if _place(r) == _place(ours)):
            before = other["who"].startswith(f"{XLA} at ") and ours["op"] == "ssd"
            if before or (ours["op"] == "linear_scan" and other["who"] == "associative_scan"):
                made.append(
                    {
                        "claim": f"{_name(ours)}, {ours['what']}: xla over {other['who']}",
                        "clock": ours["median"] / other["median"],
                        "cpu": ours["cpu_median"] / other["cpu_median"],
                    }
                )
    return made


def show(found: Row, console: Console) -> None:
    """Print what ``results`` returns."""
    machine, device, peak = found["machine"], found["device"], found["peak"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']} at the start, "
        f"{machine['date']}; {device['platform']}: {device['kind']}\n{found['method']}"
    )
    if peak:
        rates = f"{peak['flops'] / 1e9:,.0f} GFLOP/s, {peak['bytes'] / 1e9:,.0f} GB/s."
        console.print(f"{rates} {ON_CPU if device['platform'] == 'cpu' else 'From the data sheet.'}")
    for place in dict.fromkeys(map(_place, found["records"])):
        console.print(_rows([r for r in found["records"] if _place(r) == place]))
    for item in found["left_out"]:
        where = f"left out: {item['case']}, {item['what']}, {item['who']}: {item['why']}"
        console.print(where, style="yellow", markup=False)
    if found["static"]:
        console.print(STATIC)
        console.print(static_table(found["static"]))
    if found["targets"]:
        table = _table("Not slower than (at most 1)", "", "clock", "CPU seconds")
        for t in found["targets"]:
            table.add_row(t["claim"], f"{t['clock']:.2f}", f"{t['cpu']:.2f}")
        console.print(table)


def static_table(rows: Sequence[Row]) -> Table:
    """Evidence of one implementation on one chip a row."""
    columns = ("", "chip", "", "bound, ms", "kernels, cycles", "ms", "bytes", "ms", "VMEM", "")
    table = _table("Compiled for TPU, not run", *columns)
    for e in rows:
        table.add_row(
            f"{_name(e)}, {e['what']}",
            e["chip"],
            e["implementation"],
            f"{e['bound_ms']:.3f} {e['bound_by'][0].upper()}",
            _or_nothing(e["cycles"], "{:,}".format),
            _or_nothing(e["kernel_ms"], "{:.3f}".format),
            _or_nothing(e["bytes"], _size),
            _or_nothing(e["bytes_ms"], "{:.3f}".format),
            _or_nothing(e["vmem"], _size),
            e["error"].replace("[", "\\["),
        )
    return table


def _rows(records: list[Row]) -> Table:
    """Everyone at one call."""
    first = records[0]
    title = f"{_name(first)}, {first['what']}: {first['flops'] / 1e9:.3g} GFLOP, {_size(first['bytes'])}"
    if first["bound_seconds"]:
        title += f", at least {seconds(first['bound_seconds'])} ({first['bound_by']})"
    columns = ("", "median", "range", "times xla", "CPU", "times xla", "of roofline", "compiler's bytes")
    table = _table(title, *columns, "compile", "differs by")
    ours = next((r for r in records if r["who"] == XLA), first)
    for r in records:
        table.add_row(
            r["who"],
            seconds(r["median"]),
            f"{seconds(min(r['samples']))} - {seconds(max(r['samples']))}",
            f"{r['median'] / ours['median']:.2f}",
            seconds(r["cpu_median"]),
            f"{r['cpu_median'] / ours['cpu_median']:.2f}",
            _or_nothing(r["of_roofline"], "{:.1%}".format),
            _or_nothing(r["compiler_bytes"], _size),
            seconds(r["compile_seconds"]),
            _or_nothing(r["differs"], "{:.0e}".format),
        )
    return table


def plot(found: Row, path: pathlib.Path) -> None:
    """Two panels: the share of the roofline that each call reaches, and linear_scan over the length."""
    import matplotlib.pyplot as plt

    records = [r for r in found["records"] if r["of_roofline"] and r["who"] != REFERENCE]
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(15, 7), width_ratios=(3, 2), layout="constrained")
    calls = list(dict.fromkeys(_place(r) for r in records))
    whos = list(dict.fromkeys(r["who"] for r in records))
    for i, who in enumerate(whos):
        mine = {_place(r): r["of_roofline"] for r in records if r["who"] == who}
        places = [calls.index(place) + 0.8 * (i / len(whos) - 0.5) for place in mine]
        bars.barh(places, list(mine.values()), 0.8 / len(whos), label=who, color=f"C{i % 10}", align="edge")
    names = {_place(r): f"{_name(r)}{'' if r['what'] == FORWARD else ' +grad'}" for r in records}
    bars.set_yticks(range(len(calls)), [names[call] for call in calls], fontsize=7)
    bars.invert_yaxis()
    bars.set(xlabel="bound / median", xscale="log", title="share of the roofline")
    bars.axvline(1, color="black", linewidth=0.8)
    bars.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=6)
    for what, style in {r["what"]: "-" if r["what"] == FORWARD else "--" for r in records}.items():
        for i, who in enumerate(whos):
            scans = [r for r in records if (r["op"], r["who"], r["what"]) == ("linear_scan", who, what)]
            if scans:
                x, y = zip(*sorted((r["shape"]["L"], 1e3 * r["median"]) for r in scans))
                lines.plot(x, y, style, marker="o", color=f"C{i % 10}", label=f"{who}, {what}")
    lines.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title="linear_scan")
    if lines.lines:
        lines.legend(fontsize=8)
    figure.suptitle(f"{found['device']['kind']}, {found['machine']['cpu']}, {found['machine']['date'][:10]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    return table


def _place(r: Row) -> tuple:
    return r["op"], tuple(r["shape"].items()), r["dtype"], r["what"]


def _name(r: Row) -> str:
    return str(Case(r["op"], r["shape"], r["dtype"]))


def _or_nothing(value: Any, write: Callable[[Any], str]) -> str:
    return "" if value is None else write(value)


def _size(count: float) -> str:
    return f"{count / 1e6:,.4g} MB"

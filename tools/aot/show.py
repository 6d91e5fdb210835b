"""The report of a pod check as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.aot.expected import EXPECTED
from tools.aot.explain import summary
from tools.aot.memory import Memory, gib
from tools.aot.suggest import Candidate


def show(report: Mapping[str, Any], console: Console) -> None:
    """Print what ``check`` returns."""
    rows, length = report["batch"]
    console.print(
        f"[bold]{report['config']}[/bold], {report['parameters'] / 1e9:.3f} B parameters, batch {rows} x "
        f"{length:,}, remat {report['remat']}, accumulation {report['accumulation']}\n"
        f"{report['topology']}: {report['described']}"
    )
    _show_memory(report, console)
    for program in report["programs"]:
        if program["collectives"]:
            _show_collectives(program, console)
        if program["buffers"]:
            _show_buffers(program, console)
    _show_reasons(report, console)
    for program in report["programs"]:
        _show_verdict(program, console)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    return table


def _show_memory(report: Mapping[str, Any], console: Console) -> None:
    programs = report["programs"]
    table = _table(f"Memory of one device, of {gib(report['hbm'])}", "", *(p["name"] for p in programs))
    memories = [Memory(**{k: v for k, v in p["memory"].items() if k != "total"}) for p in programs]
    for name in dict.fromkeys(name for m in memories for name in m.shares):
        table.add_row(name, *(gib(m.shares[name]) if name in m.shares else "" for m in memories))
    table.add_section()
    table.add_row("total", *(gib(m.total) for m in memories))
    for name, key, form in (
        ("tracing, lowering", "lower_seconds", "{:.1f} s"),
        ("compiling", "compile_seconds", "{:.1f} s"),
        ("operations of a device, by XLA (a loop's body once, no kernels)", "flops_compiler", "{:.3g}"),
        ("operations of a device, by the model", "flops_model", "{:.3g}"),
    ):
        table.add_row(name, *(form.format(p[key]) if p.get(key) else "" for p in programs))
    console.print(table)


def _show_collectives(program: Mapping[str, Any], console: Console) -> None:
    title = f"{program['name']}: collectives"
    table = _table(title, "kind", "axes", "what", "count", "times", "bytes", left=3)
    for row in summary(program["collectives"]):
        table.add_row(
            row["kind"],
            ", ".join(row["axes"]),
            row["expected"] or "[red]unexplained[/red]",
            str(row["count"]),
            f"{row['times']:,}" + ("" if row["counted"] else "+"),
            gib(row["bytes"]),
        )
    console.print(table)


def _show_reasons(report: Mapping[str, Any], console: Console) -> None:
    """What the collectives that occur are for."""
    names = {n for p in report["programs"] for c in p["collectives"] for n in c["expected"].split(", ")}
    table = _table("What they are", "what", "layer", "why", left=3)
    for row in EXPECTED:
        if row.name in names:
            table.add_row(row.name, row.layer, row.why)
    console.print(table)


def _show_buffers(program: Mapping[str, Any], console: Console) -> None:
    table = _table(f"{program['name']}: largest values", "shape", "from", "bytes", left=2)
    for buffer in program["buffers"][:5]:
        table.add_row(
            buffer["shape"], buffer["where"] or buffer["op_name"] or buffer["name"], gib(buffer["bytes"])
        )
    console.print(table)


def _show_verdict(program: Mapping[str, Any], console: Console) -> None:
    if program.get("refused"):
        console.print(f"{program['name']}: XLA says: {program['refused'].splitlines()[0]}", markup=False)
    kernels = ", ".join(f"{name} x{times}" for name, times in program.get("kernels", {}).items())
    console.print(f"{program['name']}: Pallas kernels: {kernels or 'none'}")
    if program.get("unexplained"):
        console.print(f"{program['name']}: unexplained collectives: {', '.join(program['unexplained'])}")
    color = "green" if program["fits"] else "red"
    console.print(f"[{color}]{program['name']}: {program['verdict']}[/{color}]")


def show_candidates(
    candidates: Sequence[Candidate], available: int, console: Console, count: int = 12
) -> None:
    """Print the first ``count`` of a ranking."""
    table = _table(
        f"{len(candidates)} choices, by the model of tools/aot/suggest.py", "choice", "memory", "a step"
    )
    for candidate in candidates[:count]:
        fits = "" if candidate.memory <= available else " too much"
        table.add_row(candidate.command, gib(candidate.memory) + fits, f"{candidate.seconds:.3g} s")
    console.print(table)

"""The results of ``benchmarks.memory`` as tables on a terminal, and as a picture."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.tables import seconds


def show(found: dict[str, Any], console: Console) -> None:
    """Print what ``results`` returns."""
    described, plan = found["machine"], found["plan"]
    console.print(
        f"{described['cpu']}, {described['cores']} cores, load {described['load_1min']} at the start, "
        f"{described['date']}; {found['device']}\n{found['method']}"
    )
    title = found["backbone"]
    if plan["sequence"] > 1:
        title += f", time over {plan['sequence']} devices (memory of one)"
    table = _table(title, "", "tokens", "prompt", "GFLOP/s", "a token", "state", "forward", "with gradients")
    for r in found["records"]:
        prefill, decode = (
            statistics.median(r[field]) if r[field] else None for field in ("prefill", "decode")
        )
        table.add_row(
            r["model"],
            f"{r['length']:,}",
            seconds(prefill) if prefill else "",
            f"{r['flops'] / prefill / 1e9:,.1f}" if prefill else "",
            seconds(decode) if decode else "",
            *(f"{r[field] / 2**20:,.1f} MiB" for field in ("state", "forward", "gradient")),
        )
    console.print(table)
    columns = (
        "tokens",
        "operations",
        "prompt",
        "of a token",
        "a token",
        "state",
        "forward",
        "with gradients",
    )
    table = _table("", "growth", *columns)
    fields = ("length", "flops", "prefill", "step_flops", "decode", "state", "forward", "gradient")
    for g in found["growth"]:
        table.add_row(g["model"], *(f"{g[f]:,.2f}x" if f in g else "" for f in fields))
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """Over the length: prompt, token, state, memory with gradients."""
    import matplotlib.pyplot as plt

    drawn = (
        ("prefill", "prompt, s", 1.0),
        ("decode", "a token, ms", 1e3),
        ("state", "state, MiB", 2**-20),
        ("gradient", "memory with gradients, MiB", 2**-20),
    )
    panels = [panel for panel in drawn if all(r[panel[0]] for r in found["records"])]  # times may be missing
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (field, label, unit) in zip(axes, panels):
        for name in found["plan"]["models"]:
            mine = [r for r in found["records"] if r["model"] == name]
            values = [statistics.median(r[field]) if isinstance(r[field], tuple) else r[field] for r in mine]
            axis.plot([r["length"] for r in mine], [unit * v for v in values], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    described = found["machine"]
    figure.suptitle(f"{found['device']}, {described['cpu']}, {described['date'][:10]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)

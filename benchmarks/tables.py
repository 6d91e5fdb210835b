"""The results of ``benchmarks.lm`` as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.peers import OURS
from benchmarks.report import Medians, matmul_share, weights_time

TITLES = {
    "train": "Training step, {} tokens",
    "prefill": "Prefill of {} tokens, with the logits of the last",
    "decode": "Decode after {} tokens, per token",
    "decode_calls": "Decode after {} tokens with one call a token, per token (JAX peers)",
}


def show(found: dict[str, Any], console: Console) -> None:
    """Print ``report.results``: the comparison, ours over length, and the targets."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']} at the start, "
        f"{machine['date']}; {versions}\n{found['method']}"
    )
    for length in found["plan"]["lengths"]:
        for what in TITLES:
            if (rows := _rows(found, what, length)) is not None:
                console.print(rows)
    for table in (_peers(found), _growth(found), _contexts(found), _targets(found)):
        if table.row_count:
            console.print(table)
    if not all(r["steady"] for r in found["records"]):
        console.print(
            "[yellow](!) the samples disagree: the machine was busy. Repeat before quoting.[/yellow]"
        )


def _table(title: str, *columns: str) -> Table:
    """The first column holds names, the others numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    return table


def _rows(found: dict[str, Any], what: str, length: int) -> Table | None:
    """All peers at one job, or None if nobody was asked."""
    records = [r for r in found["records"] if (r["part"], r["what"], r["length"]) == ("peers", what, length)]
    if not records:
        return None
    columns = ("", "median", "range", "times ours", "tokens/s", "compile")
    table = _table(TITLES[what].format(length), *columns)
    ours = next(r["median"] for r in records if r["peer"] == OURS)
    for r in records:
        table.add_row(
            r["peer"],
            seconds(r["median"]),
            f"{seconds(min(r['samples']))} - {seconds(max(r['samples']))}{'' if r['steady'] else ' (!)'}",
            f"{r['median'] / ours:.2f}",
            f"{r['tokens_per_second']:,.0f}",
            seconds(r["compile_seconds"]),
        )
    return table


def _peers(found: dict[str, Any]) -> Table:
    """Who took part, who could not, and whether they computed the same."""
    checked = found["plan"]["checked"]
    table = _table("Peers", "", "what", f"logits, {checked} tokens: largest difference", "peak memory")
    for peer, about in found["peers"].items():
        difference, peak = found["logit_difference"].get(peer), found["peak_bytes"].get(peer)
        if why := found["failures"].get(peer):
            about = f"[yellow]{why.replace('[', chr(92) + '[')}[/yellow]"
        table.add_row(
            peer,
            about,
            "" if difference is None else f"{difference:.1e}",
            "" if peak is None else f"{peak / 2**20:,.0f} MiB",
        )
    return table


def _growth(found: dict[str, Any]) -> Table:
    """Ours over length: time, against the shortest, and the share of the matmul rate."""
    columns = ("training step", "growth", "of matmul rate", "prefill", "growth", "of matmul rate")
    table = _table(
        f"longspan over length; this machine multiplies {found['floors']['matmul_flops'] / 1e9:.0f} GFLOP/s",
        "tokens",
        *columns,
    )
    median = Medians(found)
    lengths = [key[-1] for key in median.keys_of("scaling", OURS, "train")]
    for length in lengths:
        cells = []
        for what in ("train", "prefill"):
            taken = median["scaling", OURS, what, length]
            growth = taken / median["scaling", OURS, what, lengths[0]]
            cells += [seconds(taken), f"{growth:.2f}", f"{matmul_share(found, what, length, taken):.0%}"]
        table.add_row(f"{length:,}", *cells)
    return table


def _contexts(found: dict[str, Any]) -> Table:
    """Ours: time and state of a decoded token after each context, beside the reading of the weights."""
    from_memory, from_cache = weights_time(found), weights_time(found, "weights")
    table = _table(
        f"longspan decoding; its {found['floors']['weights_bytes'] / 2**20:.1f} MiB of weights are read in "
        f"{seconds(from_memory)} from memory, in {seconds(from_cache)} over and over from cache",
        *("context", "per token", "times reading from memory", "from cache", "carried bytes"),
    )
    median = Medians(found)
    for *_, context in median.keys_of("contexts", OURS, "decode"):
        taken = median["contexts", OURS, "decode", context]
        ratios = (f"{taken / floor:.2f}" for floor in (from_memory, from_cache))
        table.add_row(f"{context:,}", seconds(taken), *ratios, f"{found['carried_bytes']:,}")
    return table


def _targets(found: dict[str, Any]) -> Table:
    table = _table("Targets", "", "found", "wanted", "")
    for t in found["targets"]:
        sign = "at least" if t["at_least"] else "at most"
        verdict = "[green]met[/green]" if t["met"] else "[red]missed[/red]"
        verdict = verdict if t["steady"] else f"{verdict} (!)"
        table.add_row(t["claim"], f"{t['found']:.2f}", f"{sign} {t['wanted']:g}", verdict)
    return table


def seconds(value: float) -> str:
    """Three digits with a unit: "1.23 s", "45.6 ms", "789 us"."""
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e-3)) if value >= u[1]), ("us", 1e-6))
    return f"{value / scale:.3g} {unit}"

"""Generation from a published size against transformers: ``python -m benchmarks.generate [--quick]``.

Mamba-2 130M with random weights, in float32, on the CPU: a prompt of 4096 tokens is read, and 128 are made
after it. Same weights (the logits are compared first), tokens and cores; each side has its own process, and
samples are taken in turns (``benchmarks.lm`` has the method). Beside them floors: the multiplications of the
prompt at the fastest matmul measured here, and the weights read once a token. Prints a table; writes JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.peers import DECODE_STEPS, OURS
from benchmarks.plan import Plan
from benchmarks.results_file import write
from benchmarks.run import Run
from benchmarks.tables import seconds
from benchmarks.workload import Shape, build
from models.functional import parameter_count

PEER = "transformers"
PROMPT, NEW = 4096, 128
TIMES = 3.0  # as fast as transformers, at least
SHAPE = Shape(vocab_size=50288, d_model=768, n_layers=24)


def results(run: Run, floors: dict[str, float], described: dict[str, Any], new: int) -> dict[str, Any]:
    """Seconds of the prompt, of ``new`` tokens and of both, by side, as plain values for JSON."""
    shape, (length,) = run.plan.shape, run.plan.lengths
    model, _ = build(shape)
    count = parameter_count(model.shapes)
    flops = model.bind(model.shapes).flops_per_token(length) * length
    least = {
        "prefill": flops / floors["matmul_flops"],
        "decode": new * 4 * count / floors["weights_bytes_per_second"],
    }
    medians = {(r.peer, r.what): r.median for r in run.records}
    sides = {}
    for peer in (OURS, PEER):
        if (peer, "decode") in medians:
            parts = {"prefill": medians[peer, "prefill"], "decode": new * medians[peer, "decode"]}
            sides[peer] = parts | {"both": sum(parts.values())}
    steady = all(r.steady for r in run.records)
    ratios = {w: sides[PEER][w] / sides[OURS][w] for w in sides[OURS]} if PEER in sides else {}
    return {
        "benchmark": "generate",
        "machine": described,
        "shape": dataclasses.asdict(shape) | {"parameters": count},
        "prompt": length,
        "new": new,
        "seconds": sides,
        "floors": least | {"both": sum(least.values())},
        "times": ratios,
        "wanted_times": TIMES,
        "met": steady and bool(ratios) and min(ratios["prefill"], ratios["decode"]) >= TIMES,
        "steady": steady,
        "logit_difference": run.logit_difference,
        "failures": run.failures,
        "records": [dataclasses.asdict(r) | {"median": r.median} for r in run.records],
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print what ``results`` returns."""
    described, shape = found["machine"], found["shape"]
    console.print(
        f"{described['cpu']}, {described['cores']} cores, load {described['load_1min']} at the start, "
        f"{described['date']}; {shape['parameters']:,} parameters"
    )
    table = Table(title=f"A prompt of {found['prompt']:,} tokens, {found['new']} more", title_justify="left")
    for column in ("", *found["seconds"], "floor", "over it", f"{PEER} / {OURS}"):
        table.add_column(column, justify="right" if column else "left")
    for what in ("prefill", "decode", "both"):
        taken = [side[what] for side in found["seconds"].values()]
        floor, times = found["floors"][what], found["times"].get(what)
        over = f"{taken[0] / floor:.2f}"
        table.add_row(what, *map(seconds, taken), seconds(floor), over, f"{times:.1f}" if times else "-")
    console.print(table)
    for name, reason in found["failures"].items():
        console.print(f"{name} left out: {reason}")
    for name, difference in found["logit_difference"].items():
        console.print(f"largest difference of a logit from ours, {name}: {difference:.1e}")
    if not found["steady"]:
        console.print("the samples disagree: the machine was busy, and the ratios compare nothing")
    console.print(f"each part at least {TIMES:g} times as fast: {'met' if found['met'] else 'missed'}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.generate", allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="two layers, 512 tokens, three samples: that it works")
    add("--repeats", type=int, help="samples (default 5; 3 if --quick)")
    add("--out", help="JSON file (default benchmarks/results/generate_DATE_MACHINE.json)")
    given = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    shape = dataclasses.replace(SHAPE, n_layers=2, vocab_size=256) if given.quick else SHAPE
    plan = Plan(
        shape,
        what=("prefill", "decode"),
        peers=(PEER,),
        lengths=(512 if given.quick else PROMPT,),
        contexts=(),
        repeats=given.repeats or (3 if given.quick else 5),
        checked=64,
    )
    console, described = Console(), machine.describe()
    with console.status("starting") as status:
        before = machine.floors(shape)
        run = Run(plan, note=status.update)
        run.everything()
        after = machine.floors(shape)
    best = {name: max(before[name], after[name]) for name in before}  # what load there was only lowers it
    found = results(run, best, described, DECODE_STEPS if given.quick else NEW)
    show(found, console)
    console.print(f"written to {write(found, given.out)}")


if __name__ == "__main__":
    main()

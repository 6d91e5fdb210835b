"""Speed of the data generators on one core: ``python -m benchmarks.generators [--quick]``.

CPU milliseconds per example, tables made beforehand, of Pathfinder at its four sizes and of ListOps, beside
those of the public generators where those were measured (elsewhere, on another machine), of the recall tasks,
and of needles in text. Prints a table; writes JSON with the machine named.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.results_file import write
from tasks import haystack
from tasks.haystack.types import Request, Sample
from tasks.lra import listops, pathfinder
from tasks.recall import RecallTask, RecallTaskConfig, Size
from tasks.recall.copying import CopyingSpec
from tasks.tokenizer import ByteTokenizer

METHOD = (
    "CPU time of one process over consecutive blocks of examples; how long an example of Pathfinder or "
    "ListOps takes varies, since both laws are sampled by rejection. Mean over all blocks, its standard "
    "error from their spread."
)
PUBLIC = (
    "drewlinsley/pathfinder at its first commit and long-range-arena's listops.py, with what they lack in "
    "current packages replaced; CPU time on an Intel Xeon with two shared cores, 2026-11-21"
)


@dataclasses.dataclass(frozen=True)
class Generator:
    """One generator.

    Attributes:
        make: makes examples start..stop-1.
        block: examples at once, as many as a shard might have.
        blocks: of a measurement.
        public_ms: of the public generator, measured elsewhere (see `PUBLIC`), None where it was not.
        target_ms: at most.
    """

    name: str
    make: Callable[[int, int], object]
    block: int
    blocks: int
    public_ms: float | None
    target_ms: float | None


def generators() -> list[Generator]:
    """All of them, hard contours for Pathfinder."""

    def images(resolution: int) -> Callable[[int, int], object]:
        return functools.partial(pathfinder.images, pathfinder.PathfinderSpec(resolution), 0)

    expressions = functools.partial(listops.examples, listops.ListOpsSpec(), 0)
    return [
        Generator("Pathfinder 32", images(32), 400, 5, 228.0, 15.0),
        Generator("Pathfinder 64", images(64), 50, 6, 8700.0, None),
        Generator("Pathfinder 128 (Path-X)", images(128), 50, 6, 2700.0, 100.0),
        Generator("Pathfinder 256", images(256), 50, 5, 240.0, 50.0),
        Generator("ListOps", expressions, 1000, 5, 3.1, 0.6),
        *_recall(),
        *_needles(),
    ]


def _recall() -> list[Generator]:
    """Recall tasks; the laws ask for at least 1000 rows a second."""
    copying = RecallTaskConfig(name="copying", copying=CopyingSpec("selective"))
    cases: list[tuple[str, RecallTaskConfig, Size]] = [
        ("MQAR, 4 pairs in 64", RecallTaskConfig(), (64, 4)),
        ("MQAR, 256 pairs in 1024", RecallTaskConfig(), (1024, 256)),
        ("Selective copying, 16 in 4112", copying, (4112, 16)),
        ("Repeat After Me, 50 in 220", RecallTaskConfig(name="repeat"), (220, 50)),
        ("Induction heads, 256", RecallTaskConfig(name="induction"), (256, 1)),
        ("Phonebook, 40 entries", RecallTaskConfig(name="phonebook"), (0, 40)),
        ("MAD recall, 8 keys in 128", RecallTaskConfig(name="in_context"), (128, 8)),
    ]

    def rows(config: RecallTaskConfig, size: Size) -> Callable[[int, int], object]:
        task = RecallTask(dataclasses.replace(config, train_sizes=(size,)))
        return lambda start, stop: task.held_out(size, np.arange(start, stop))

    return [Generator(name, rows(config, size), 250, 8, None, 1.0) for name, config, size in cases]


def _needles() -> list[Generator]:
    """Needles in 4096 bytes of the text that each task was published with, or of sentences made by rule."""
    tokenizer = ByteTokenizer()

    def prompts(name: str) -> Callable[[int, int], object]:
        def make(start: int, stop: int) -> list[Sample]:
            rngs = (np.random.default_rng(i) for i in range(start, stop))
            return [haystack.GENERATORS[name](Request(rng, tokenizer, 4096)) for rng in rngs]

        return make

    names = ("stuffed_mamba", "landmark", "niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe", "qa3")
    return [Generator(f"{name} in 4096", prompts(name), 50, 4, None, None) for name in names]


def measure(generator: Generator, quick: bool) -> dict[str, Any]:
    """CPU milliseconds an example: "ms", its standard error "error", and the public generator's."""
    block, blocks = (generator.block // 5, 3) if quick else (generator.block, generator.blocks)
    generator.make(0, 1)
    samples = []
    for number in range(blocks):
        start = time.process_time()
        generator.make(1 + number * block, 1 + (number + 1) * block)
        samples.append(1e3 * (time.process_time() - start) / block)
    mean = math.fsum(samples) / blocks
    spread = math.fsum((sample - mean) ** 2 for sample in samples) / (blocks - 1)
    return {
        "name": generator.name,
        "examples": block * blocks,
        "ms": mean,
        "error": math.sqrt(spread / blocks),
        "public_ms": generator.public_ms,
        "target_ms": generator.target_ms,
    }


def show(results: dict[str, Any], console: Console) -> None:
    """Print the results as a table."""
    found = results["machine"]
    console.print(f"{found['cpu']}, load {found['load_1min']} at the start, {found['date']}\n{METHOD}")
    table = Table(title="CPU milliseconds an example, one core", title_justify="left", title_style="bold")
    for i, name in enumerate(("", "examples", "ours", "target", "public", "examples/s")):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in results["records"]:
        table.add_row(
            row["name"],
            str(row["examples"]),
            f"{row['ms']:.2f} ± {row['error']:.2f}",
            "" if row["target_ms"] is None else f"≤ {row['target_ms']:g}",
            "" if row["public_ms"] is None else f"{row['public_ms']:g}",
            f"{1e3 / row['ms']:,.0f}",
        )
    console.print(table)
    console.print(f"public: {PUBLIC}.")


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser("python -m benchmarks.generators", allow_abbrev=False)
    options.add_argument("--quick", action="store_true", help="a few seconds: fewer examples")
    options.add_argument("--out", help="JSON file (default under benchmarks/results)")
    given = options.parse_args(argv)
    console = Console()
    described = machine.describe()
    with console.status("") as status:
        records = []
        for generator in generators():
            status.update(generator.name)
            records.append(measure(generator, given.quick))
    results = {
        "benchmark": "generators",
        "method": METHOD,
        "public": PUBLIC,
        "machine": described,
        "records": records,
    }
    show(results, console)
    console.print(f"written to {write(results, given.out)}")


if __name__ == "__main__":
    main()

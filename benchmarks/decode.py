"""One more token: latency against batch and context: ``python -m benchmarks.decode [--quick]``.

Small language models of each kind of mixer decode after a context, beside the floor of reading their weights
and state once. A recurrent model's time does not depend on the context, attention's grows with it. The
context is not computed: a state of zeros of its length takes the same time. Prints tables; writes JSON and a
picture.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.chips import peak_of_kind
from benchmarks.results_file import write
from benchmarks.tables import seconds
from benchmarks.timing import Stopwatch
from eval.decode import taken_apart
from models.config import LMConfig
from models.functional import Functional
from models.lm import LM
from runtime.host import restart_with_tuned_malloc

STEPS = 16  # tokens a call, one compiled scan, as in eval/decode.py
FLAT = 1.2  # a recurrent model's longest context over its shortest, at most
PATTERNS = {
    "attention": "*-*-",
    "hybrid": "M-*-",
    "mamba2": "M-M-",
    "mamba": "m-m-",
    "s4": "S-S-",
    "s4d": "D-D-",
    "dss": "d-d-",
    "s5": "s-s-",
}
METHOD = (
    f"Greedy decoding, {STEPS} tokens a call in one compiled scan, medians of a token's time; contexts in "
    "turns. Floor: weights and state (a recurrent state read and written, a key/value cache read) once a "
    "token, at the rate at which as many bytes are read over and over here, or that of the chip's data sheet."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: ``models`` are names of ``PATTERNS``."""

    models: Sequence[str] = tuple(PATTERNS)
    batches: Sequence[int] = (1, 8)
    contexts: Sequence[int] = (1024, 4096, 16384)
    d_model: int = 256
    repeats: int = 7


@dataclasses.dataclass(frozen=True)
class Record:
    """Seconds of a token, for all rows together.

    Attributes:
        bytes: that one token must read or write at least. floor: seconds that takes.
    """

    model: str
    batch: int
    context: int
    compile_seconds: float
    samples: tuple[float, ...]
    bytes: int
    floor: float

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


class Decoder:
    """A model after ``context`` tokens; :meth:`call` makes ``STEPS`` more and goes back."""

    def __init__(self, pattern: str, d_model: int, batch: int, context: int):
        config = LMConfig(vocab_size=256, vocab_multiple=1, d_model=d_model, pattern=pattern)
        self.model = Functional.create(lambda rngs: LM(config, rngs=rngs))
        self.params = jax.jit(self.model.init)(jax.random.key(0))
        self.context = context
        empty = self.model.bind(self.params).init_state(batch, context + STEPS)
        # Copies: keys and values may start as the same zeros, and are donated each.
        self.carry = jnp.zeros(batch, jnp.int32), jax.tree.map(jnp.copy, self._after_context(empty))
        begin = time.perf_counter()
        self._ready = self.params, taken_apart(self.model, self.params)
        self._run = jax.jit(self._steps, donate_argnums=1).lower(self._ready, self.carry).compile()
        self.compile_seconds = time.perf_counter() - begin

    def call(self) -> jax.Array:
        """Ids [B] after ``STEPS`` tokens; the cache goes on from where it was."""
        self.carry = self._run(self._ready, self.carry)
        return self.carry[0]

    def bytes(self) -> int:
        """The least that one token reads and writes."""
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.carry[1]):
            total += leaf.nbytes * (1 if _name(path) in ("k", "v") else 2)
        return total

    def _steps(self, ready: Any, carry: Any) -> Any:
        lm = self.model.bind(ready[0])
        lm.backbone.put_apart(ready[1])

        def step(carry: Any, _: None) -> tuple[Any, None]:
            token, state = carry
            hidden, state, _ = lm(token[:, None], state)
            token = jnp.argmax(lm.logits(hidden)[:, -1], axis=-1)
            return (token.astype(jnp.int32), state), None

        (token, state), _ = jax.lax.scan(step, carry, length=STEPS)
        return token, self._after_context(state)

    def _after_context(self, state: Any) -> Any:
        """``state`` as if ``context`` tokens of one document had been read."""
        now = {"length": self.context, "position": self.context - 1, "segment": 1}

        def set_counters(path: Any, leaf: jax.Array) -> jax.Array:
            name = _name(path)
            return jnp.full_like(leaf, now[name]) if name in now else leaf

        return jax.tree_util.tree_map_with_path(set_counters, state)


def _name(path: Any) -> str:
    return str(getattr(path[-1], "key", path[-1]))


def run(plan: Plan, note: Callable[[str], None]) -> list[Record]:
    """All of ``plan``."""
    records = []
    for name in plan.models:
        for batch in plan.batches:
            records += _contexts(plan, name, batch, note)
    return records


def _contexts(plan: Plan, name: str, batch: int, note: Callable[[str], None]) -> list[Record]:
    """One model and batch after every context, samples in turns."""
    decoders, watches = {}, {}
    for context in plan.contexts:
        note(f"{name}, batch {batch}, context {context}: compiling")
        decoders[context] = Decoder(PATTERNS[name], plan.d_model, batch, context)
        watches[context] = Stopwatch(decoders[context].call)
        watches[context].warm_up()
    samples: dict[int, list[float]] = {context: [] for context in plan.contexts}
    for turn in range(plan.repeats):
        note(f"{name}, batch {batch}: turn {turn + 1} of {plan.repeats}")
        for context, watch in watches.items():
            samples[context].append(watch.sample() / STEPS)
    records = []
    for context, decoder in decoders.items():
        moved = decoder.bytes()
        fixed = name, batch, context, decoder.compile_seconds, tuple(samples[context])
        records.append(Record(*fixed, moved, moved / _rate(moved)))
    return records


def _rate(size: int) -> float:
    """Bytes/s at which ``size`` bytes can be read by the device at hand."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return machine.read_rate(size, repeats=3)
    peak = peak_of_kind(device.device_kind)
    if peak is None:
        raise ValueError(f"no data sheet of {device.device_kind!r}: add it to PEAKS in benchmarks/chips.py")
    return peak.bytes


def results(plan: Plan, records: Sequence[Record], described: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "benchmark": "decode",
        "method": METHOD,
        "machine": described,
        "device": jax.devices()[0].device_kind,
        "plan": dataclasses.asdict(plan),
        "records": [dataclasses.asdict(r) | {"median": r.median} for r in records],
        "targets": targets(records),
    }


def targets(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For models without attention: the longest context over the shortest."""
    made = []
    for name, batch in dict.fromkeys((r.model, r.batch) for r in records if "*" not in PATTERNS[r.model]):
        mine = sorted((r for r in records if (r.model, r.batch) == (name, batch)), key=lambda r: r.context)
        found = mine[-1].median / mine[0].median
        claim = f"{name}, batch {batch}: context {mine[-1].context} over {mine[0].context}"
        made.append({"claim": claim, "found": found, "wanted": FLAT, "met": found <= FLAT})
    return made


def show(found: dict[str, Any], console: Console) -> None:
    """Print what ``results`` returns."""
    described = found["machine"]
    console.print(
        f"{described['cpu']}, {described['cores']} cores, load {described['load_1min']} at the start, "
        f"{described['date']}; {found['device']}\n{found['method']}"
    )
    title = f"Decoding, d_model {found['plan']['d_model']}"
    table = Table(title=title, title_justify="left", title_style="bold")
    columns = (
        "",
        "batch",
        "context",
        "a token",
        "range",
        "tokens/s",
        "bytes",
        "floor",
        "over it",
        "compile",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for r in found["records"]:
        table.add_row(
            f"{r['model']} {PATTERNS[r['model']]}",
            str(r["batch"]),
            f"{r['context']:,}",
            seconds(r["median"]),
            f"{seconds(min(r['samples']))} - {seconds(max(r['samples']))}",
            f"{r['batch'] / r['median']:,.0f}",
            f"{r['bytes'] / 1e6:,.4g} MB",
            seconds(r["floor"]),
            f"{r['median'] / r['floor']:.2f}",
            seconds(r["compile_seconds"]),
        )
    console.print(table)
    for t in found["targets"]:
        verdict = "[green]met[/green]" if t["met"] else "[red]missed[/red]"
        console.print(f"{t['claim']}: {t['found']:.2f}, at most {t['wanted']:g}: {verdict}")


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """Latency over context, a panel for each batch; dotted the floors."""
    import matplotlib.pyplot as plt

    batches, models = found["plan"]["batches"], found["plan"]["models"]
    figure, panels = plt.subplots(
        1, len(batches), figsize=(6 * len(batches), 5), squeeze=False, sharey=True, layout="constrained"
    )
    for panel, batch in zip(panels[0], batches):
        for i, name in enumerate(models):
            mine = [r for r in found["records"] if (r["model"], r["batch"]) == (name, batch)]
            contexts = [r["context"] for r in mine]
            panel.plot(contexts, [1e3 * r["median"] for r in mine], marker="o", color=f"C{i}", label=name)
            panel.plot(contexts, [1e3 * r["floor"] for r in mine], ":", color=f"C{i}")
        panel.set(xscale="log", yscale="log", xlabel="context", title=f"batch {batch}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms a token")
    panels[0][-1].legend(title="dotted: floor", fontsize=8)
    described = found["machine"]
    figure.suptitle(f"decoding, {found['device']}, {described['cpu']}, {described['date'][:10]}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.decode", allow_abbrev=False)
    add: Any = parser.add_argument
    add("--models", help=f"some of {','.join(PATTERNS)} (default all; the first four if --quick)")
    add("--quick", action="store_true", help="about a minute: fewer models, one row, short contexts")
    add("--repeats", type=int, help="samples (default 7; 3 if --quick)")
    add("--out", help="JSON file (default benchmarks/results/decode_DATE_MACHINE.json), picture beside it")
    given = parser.parse_args(argv)
    models = given.models.split(",") if given.models else list(PATTERNS)[: 4 if given.quick else None]
    if unknown := sorted(set(models) - set(PATTERNS)):
        parser.error(f"--models: {unknown[0]!r} is unknown; use some of {','.join(PATTERNS)}")
    plan = Plan(models)
    if given.quick:
        plan = Plan(models, batches=(1,), contexts=(512, 4096), repeats=3)
    plan = dataclasses.replace(plan, repeats=given.repeats or plan.repeats)
    console, described = Console(), machine.describe()
    with console.status("starting") as status:
        records = run(plan, status.update)
    found = results(plan, records, described)
    show(found, console)
    path = write(found, given.out)
    plot(found, path.with_suffix(".png"))
    console.print(f"written to {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()

"""Speed of a Mamba-2 language model against its peers: ``python -m benchmarks.lm [--quick]``.

Training, prefill and decode of ours, of Hugging Face transformers, of a plain torch SSD and of mamba2-jax
(``pip install -e '.[bench]'``), on the CPU: same weights (the logits are compared first), tokens, float32 and
cores; a training step ends with an AdamW update for all. Each peer has its own process, and samples are taken
in turns. Then ours alone: growth with length, decoding after growing contexts, and how far each number is
from what the machine can do. Prints tables; writes JSON with the machine named.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import app, flags
from rich.console import Console

from benchmarks import machine, report, tables
from benchmarks.peers import OURS, PEERS
from benchmarks.plan import WHAT, Job, Plan, Record
from benchmarks.timing import Timing
from benchmarks.workers import PeerFailed, Worker
from benchmarks.workload import Shape

RESULTS = pathlib.Path(__file__).parent / "results"
T = TypeVar("T")


class Run:
    """The peers at work, and what they were found to do.

    Attributes:
        records: every measurement.
        failures: by peer, why it was left out.
        logit_difference: by peer, the largest absolute difference of a logit from ours.
        peak_bytes: by peer, the most memory its process held up to the end of the comparison.
        carried_bytes: what ours keeps from token to token.
    """

    def __init__(self, plan: Plan, note: Callable[[str], None] = print):
        self.plan, self._note = plan, note
        self._workers: dict[str, Worker] = {}
        self.records: list[Record] = []
        self.failures: dict[str, str] = {}
        self.logit_difference: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.carried_bytes = 0

    def everything(self) -> None:
        """All of the plan.

        Raises:
            PeerFailed: ours failed. A peer that fails is noted in ``failures``.
        """
        plan = self.plan
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._compare_logits()
            for length in plan.lengths:
                for what in ("train", "prefill", "decode", "decode_calls"):
                    if what.removesuffix("_calls") in plan.what:
                        self._measure([Job("peers", peer, what, length) for peer in self._workers])
            for name in list(self._workers):
                self.peak_bytes[name] = self._ask(name, Worker.peak_bytes) or 0
            if "scaling" in plan.what:
                for what in ("train", "prefill"):
                    self._measure([Job("scaling", OURS, what, length) for length in plan.scaling])
            if "decode" in plan.what:
                self._measure([Job("contexts", OURS, "decode", n) for n in plan.contexts])
            self.carried_bytes = self._workers[OURS].ask("carried_bytes")

    def _start(self, stack: contextlib.ExitStack) -> None:
        for name in dict.fromkeys((OURS, *self.plan.peers)):
            missing = PEERS[name].missing()
            if missing:
                self.failures[name] = missing
                continue
            self._note(f"starting {name}")
            try:
                self._workers[name] = stack.enter_context(Worker(name, self.plan.shape))
            except PeerFailed as error:
                self._fail(name, error)

    def _compare_logits(self) -> None:
        ours = self._workers[OURS].logits(self.plan.checked)
        for name in list(self._workers):
            theirs = self._ask(name, Worker.logits, self.plan.checked)
            if theirs is not None:
                self.logit_difference[name] = float(np.abs(theirs - ours).max())

    def _measure(self, jobs: Sequence[Job]) -> None:
        """Warm up all jobs, then sample them in turns: a busy second of the machine falls on all alike."""
        firsts: dict[Job, float] = {}
        for job in jobs:
            self._note(f"{job.what} of {job.length} tokens: {job.peer}")
            first = self._ask(job.peer, Worker.start, job.what, job.length)
            if first is not None:
                firsts[job] = first
        samples: dict[Job, list[float]] = {job: [] for job in firsts}
        for _ in range(self.plan.repeats):
            for job, taken in samples.items():
                sample = self._ask(job.peer, Worker.sample, job.what, job.length)
                if sample is not None:
                    taken.append(sample)
        for job, taken in samples.items():
            if len(taken) == self.plan.repeats:
                timing = Timing(firsts[job], tuple(taken))
                self.records.append(Record.create(job, timing, self.plan.shape.batch))
            self._ask(job.peer, Worker.forget)

    def _ask(self, name: str, method: Callable[..., T], *args: Any) -> T | None:
        """``method`` of the peer's worker; None once the peer has failed."""
        if name not in self._workers:
            return None
        try:
            return method(self._workers[name], *args)
        except PeerFailed as error:
            self._fail(name, error)
            return None

    def _fail(self, name: str, error: PeerFailed) -> None:
        if name == OURS:
            raise error
        self.failures[name] = str(error)
        self._workers.pop(name, None)


def measure(plan: Plan, console: Console) -> dict[str, Any]:
    """Carry out ``plan``, and what it found as a dict for JSON."""
    jax.config.update("jax_platforms", "cpu")
    before = machine.describe()
    floors = [machine.floors(plan.shape)]
    with console.status("starting") as status:
        run = Run(plan, note=status.update)
        run.everything()
    floors.append(machine.floors(plan.shape))
    best = {name: max(f[name] for f in floors) for name in floors[0]}  # what load there was only lowers it
    return report.results(run, before, best)


def write(results: dict[str, Any], path: str | None) -> pathlib.Path:
    """To ``path``, or to a name made of the date and the CPU under ``benchmarks/results``."""
    found = results["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{found['cpu']} {found['cores']} cores".lower()).strip("-")
    target = pathlib.Path(path) if path else RESULTS / f"lm_{found['date'][:10]}_{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    return target


_LENGTHS = flags.DEFINE_list("lengths", None, "Tokens of the comparison with peers (default 4096).")
_PEERS = flags.DEFINE_list("peers", None, f"Some of {','.join(PEERS)} (default all); ours always runs.")
_WHAT = flags.DEFINE_list("what", None, f"Some of {','.join(WHAT)} (default all).")
_REPEATS = flags.DEFINE_integer("repeats", None, "Samples of each measurement.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 256, "Chunk of the peers; 256 is their default. Ours chooses its own.")
_QUICK = flags.DEFINE_bool("quick", False, "About a minute: 1024 tokens, fewer samples.")
_OUT = flags.DEFINE_string("out", None, "JSON file (default benchmarks/results/lm_DATE_MACHINE.json).")


def plan_from_flags() -> Plan:
    """
    Raises:
        app.UsageError: a name that does not exist, or a length that is not a positive number.
    """
    given: dict[str, Any] = {"shape": Shape(chunk_size=_CHUNK.value)}
    for flag, known in ((_PEERS, tuple(PEERS)), (_WHAT, WHAT)):
        if flag.value is not None:
            unknown = sorted(set(flag.value) - set(known))
            if unknown:
                raise app.UsageError(
                    f"--{flag.name}: {unknown[0]!r} is unknown; use some of {','.join(known)}"
                )
            given[flag.name] = tuple(flag.value)
    if _LENGTHS.value is not None:
        if not all(text.isdigit() and int(text) > 0 for text in _LENGTHS.value):
            raise app.UsageError(f"--lengths: {_LENGTHS.value} should be numbers of tokens, as 1024,4096")
        given["lengths"] = tuple(int(text) for text in _LENGTHS.value)
    if _REPEATS.value is not None:
        given["repeats"] = _REPEATS.value
    return Plan.quick(**given) if _QUICK.value else Plan(**given)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    console = Console()
    results = measure(plan_from_flags(), console)
    tables.show(results, console)
    console.print(f"written to {write(results, _OUT.value)}")


if __name__ == "__main__":
    app.run(main)

"""Carrying out a plan: every call by everyone, samples in turns, each framework in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.ops import against
from benchmarks.ops.cases import ACCELERATOR, ACCELERATOR_QUICK, BOTH, CPU, CPU_QUICK, FORWARD, WHAT, Case
from benchmarks.ops.peers import PEERS, TORCH
from benchmarks.ops.worker import Sample, Started, device, forget, sample, start
from benchmarks.workers import PeerFailed, Process
from pallas_kernels.dispatch import Kernel
from pallas_kernels.examples import examples

OURS, THEN = "longspan", "commit"  # names of processes
XLA, REFERENCE = "xla", "reference"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        ops: some of ``cases.OPS``, empty for all.
        quick: few, small calls.
        repeats: samples.
        against: the id of a commit whose ``xla`` runs too, on the CPU only.
        peers: whether other people's code runs.
    """

    ops: Sequence[str] = ()
    quick: bool = False
    repeats: int = 7
    against: str | None = None
    peers: bool = True

    def cases(self, platform: str) -> list[Case]:
        """Those chosen, for a platform."""
        chosen = (CPU, CPU_QUICK) if platform == "cpu" else (ACCELERATOR, ACCELERATOR_QUICK)
        return [case for case in chosen[self.quick] if not self.ops or case.op in self.ops]


@dataclasses.dataclass(frozen=True)
class Record:
    """One call by one implementation or peer. Seconds of a call: of the clock, and of all cores together.

    Attributes:
        who: an implementation, a peer, or "xla at COMMIT".
        compile_seconds: of the compiler alone; of torch, what the first call took longer.
        compiler_bytes: that the compiler expects its program to move, None where it does not say.
        differs: of y from that of ``xla``, over the largest of ``xla``.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    what: str
    who: str
    compile_seconds: float
    samples: tuple[float, ...]
    cpu_samples: tuple[float, ...]
    compiler_bytes: float | None = None
    differs: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclasses.dataclass
class Found:
    """What a run found out; ``left_out`` says who did not take part where, and why."""

    platform: str = ""
    kind: str = ""
    records: list[Record] = dataclasses.field(default_factory=list)
    left_out: list[dict[str, str]] = dataclasses.field(default_factory=list)


def run(plan: Plan, note: Callable[[str], None] = print) -> Found:
    """All of ``plan``.

    Raises:
        PeerFailed: ours failed. Whoever else fails is noted in ``left_out``.
        ValueError: ``plan.against`` on an accelerator, or a commit git does not know.
    """
    found = Found()
    with contextlib.ExitStack() as stack:
        processes = {OURS: stack.enter_context(Process(OURS, tuned_malloc=True, platforms=None))}
        found.platform, found.kind = processes[OURS].call(device)
        if plan.against is not None:
            if found.platform != "cpu":
                raise ValueError("--against compares on a CPU only: set JAX_PLATFORMS=cpu")
            folder = stack.enter_context(against.checkout(plan.against))
            processes[THEN] = stack.enter_context(Process(THEN, tuned_malloc=True))
            processes[THEN].call(against.use, folder)
        if plan.peers:
            processes[TORCH] = stack.enter_context(Process(TORCH, tuned_malloc=False))
        for case in plan.cases(found.platform):
            _Contest(plan, case, found, note, processes).measure()
    return found


class _Contest:
    """One call."""

    def __init__(
        self, plan: Plan, case: Case, found: Found, note: Callable[[str], None], processes: dict[str, Process]
    ):
        self.plan, self.case, self.found, self.note = plan, case, found, note
        self.processes = processes

    def measure(self) -> None:
        for what in WHAT:
            started = {}
            for who, process in self._entries(what).items():
                self.note(f"{self.case}, {what}: compiling {who}")
                if (begun := self._ask(who, what, process, start)) is not None:
                    started[who, process] = begun
            samples: dict[tuple[str, str], list[Sample]] = {key: [] for key in started}
            for turn in range(self.plan.repeats):
                self.note(f"{self.case}, {what}: turn {turn + 1} of {self.plan.repeats}")
                for (who, process), taken in samples.items():
                    if (one := self._ask(who, what, process, sample)) is not None:
                        taken.append(one)
            for (who, process), taken in samples.items():
                if len(taken) == self.plan.repeats:
                    self._record(who, what, started[who, process], taken, started.get((XLA, OURS)))
            for process in {process for _, process in started}:
                self.processes[process].call(forget)

    def _entries(self, what: str) -> dict[str, str]:
        """Who takes part, and in which process."""
        entries = dict.fromkeys(_implementations(self.case.op, self.found.platform), OURS)
        if what == BOTH:
            entries.pop(REFERENCE)  # its backward keeps every state
        if THEN in self.processes:
            entries[f"xla at {str(self.plan.against)[:10]}"] = THEN
        for name, peer in PEERS.get(self.case.op, {}).items() if self.plan.peers else ():
            if why := peer.missing(self.found.platform):
                if what == FORWARD:
                    self._leave_out(name, what, why)
                continue
            entries[name] = TORCH if peer.framework == TORCH else OURS
        return entries

    def _ask(self, who: str, what: str, process: str, function: Callable[..., Any]) -> Any:
        """``function`` in the process; None of somebody else who fails."""
        name = XLA if process == THEN else who
        try:
            return self.processes[process].call(function, self.case, name, what)
        except PeerFailed as error:
            if who == XLA:
                raise
            self._leave_out(who, what, str(error))
            return None

    def _record(self, who: str, what: str, begun: Started, taken: list[Sample], ours: Started | None) -> None:
        compile_seconds = begun.compile_seconds
        if compile_seconds is None:
            compile_seconds = max(0.0, begun.first_seconds - statistics.median(s.wall for s in taken))
        record = Record(
            self.case.op,
            dict(self.case.shape),
            self.case.dtype,
            what,
            who,
            compile_seconds,
            tuple(s.wall for s in taken),
            tuple(s.cpu for s in taken),
            begun.bytes,
            None if ours is None or ours is begun else begun.differs_from(ours),
        )
        self.found.records.append(record)

    def _leave_out(self, who: str, what: str, why: str) -> None:
        self.found.left_out.append({"case": str(self.case), "who": who, "what": what, "why": why})


def _implementations(op: str, platform: str) -> list[str]:
    """The names that run on ``platform``, in the order of the op; interpret mode is not for speed."""
    available = next(example.available for example in examples() if example.op == op)
    kernels = {name: choice for name, choice in available.items() if isinstance(choice, Kernel)}
    plain = [name for name in (REFERENCE, XLA) if name in available]
    return plain + [name for name, kernel in kernels.items() if kernel.platform == platform]

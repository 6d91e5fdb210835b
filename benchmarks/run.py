"""Carrying out a plan: every peer in its own process, samples in turns, failures noted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from benchmarks.peers import OURS, PEERS
from benchmarks.plan import Job, Plan, Record
from benchmarks.timing import Timing
from benchmarks.workers import PeerFailed, Worker

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

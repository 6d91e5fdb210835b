"""What a run of ``benchmarks.lm`` measures, and one measurement as it is written."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.peers import DECODE_STEPS, PEERS
from benchmarks.timing import Timing
from benchmarks.workload import Shape

WHAT = ("train", "prefill", "decode", "scaling")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        what: some of ``WHAT``.
        lengths: of the comparison with peers.
        scaling: ours alone, training and prefill; the last against the first is the growth reported.
        contexts: lengths of context after which ours decodes.
        repeats: samples of each measurement.
        checked: tokens on which the logits are compared.
    """

    shape: Shape = dataclasses.field(default_factory=Shape)
    what: Sequence[str] = WHAT
    peers: Sequence[str] = tuple(PEERS)
    lengths: Sequence[int] = (4096,)
    scaling: Sequence[int] = (8192, 65536)
    contexts: Sequence[int] = (1024, 8192, 32768, 131072)
    repeats: int = 7
    checked: int = 600

    @classmethod
    def quick(cls, **given: Any) -> Plan:
        """The same questions in about a minute, at sizes that answer them roughly."""
        sizes = {"lengths": (1024,), "scaling": (1024, 8192), "contexts": (256, 2048), "repeats": 3}
        merged: dict[str, Any] = sizes | given
        return cls(**merged)


@dataclasses.dataclass(frozen=True)
class Job:
    """``peer`` doing ``what`` (train, prefill, decode, decode_calls) at ``length`` tokens.

    ``part`` is the part of the run it is for: "peers", "scaling" or "contexts".
    """

    part: str
    peer: str
    what: str
    length: int


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement. Seconds are per step, per prefill or per decoded token of each row.

    ``compile_seconds`` is what the first call took longer than the median one.
    """

    part: str
    peer: str
    what: str
    length: int
    compile_seconds: float
    samples: tuple[float, ...]
    tokens_per_second: float

    @classmethod
    def create(cls, job: Job, timing: Timing, batch: int) -> Record:
        """From the time per call; a call that decodes makes ``DECODE_STEPS`` tokens a row."""
        decodes = job.what.startswith("decode")
        units, tokens = (DECODE_STEPS, DECODE_STEPS) if decodes else (1, job.length)
        return cls(
            **dataclasses.asdict(job),
            compile_seconds=timing.compile,
            samples=tuple(seconds / units for seconds in timing.samples),
            tokens_per_second=batch * tokens / timing.median,
        )

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def steady(self) -> bool:
        """Whether the samples agree: the middle half of them within a fifth of the median.

        On a busy machine they do not, and its medians compare nothing: torch, whose threads wait for each
        other by spinning, slows down twentyfold where jax slows down twofold.
        """
        rest = sorted(self.samples)[len(self.samples) // 4 : -(len(self.samples) // 4) or None]
        return rest[-1] - rest[0] <= 0.2 * self.median

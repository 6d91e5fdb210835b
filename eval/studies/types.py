"""What an analysis is given, and what it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from eval.report.document import Section

Verdict = Literal["reproduced", "not reproduced at this scale", "contradicted", "not measured"]


@dataclasses.dataclass(frozen=True)
class Record:
    """One run at the chosen learning rate of its arm, as data.

    Attributes:
        factors: of the arm.
        state_scalars: numbers in the recurrent state, for models with attention at the training length.
        fields: leaves of its config by dotted name.
        result: its result.json.
        probes: by the name of the examination ("" for the run as it is), then of the probe: its "numbers";
            those that failed or do not apply are left out.
    """

    arm: str
    factors: Mapping[str, Any]
    rate: float
    seed: int
    workdir: str
    parameters: int
    state_scalars: int
    fields: Mapping[str, Any]
    result: Mapping[str, Any]
    probes: Mapping[str, Mapping[str, Mapping[str, Any]]]

    def factor(self, name: str) -> Any:
        """Raises KeyError with the arm's name."""
        if name not in self.factors:
            raise KeyError(f"arm {self.arm} has no factor {name!r}; it has {', '.join(self.factors)}")
        return self.factors[name]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A published statement beside what was found here.

    Attributes:
        claim: the statement, with where it is from.
        criterion: what counts as reproduced, and what as contradicted.
        found: the numbers, in words.
    """

    claim: str
    criterion: str
    found: str
    verdict: Verdict
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Findings, and the sections of the report that show what they rest on."""

    findings: Sequence[Finding]
    sections: Sequence[Section]


Analyse = Callable[[Sequence[Record], Mapping[str, Any]], Analysis]
"""A pure function of the records of a study, in any state of completion, and its settings."""


def judge(interval: tuple[float, float], above: float = 0.0, *, clear: bool = True) -> Verdict:
    """Of the claim that a number lies above a threshold, from an interval of it.

    Reproduced if the whole interval does and ``clear`` (what else is asked) holds; contradicted if none of it
    does. An interval of nan says nothing was measured.
    """
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "not measured"
    if low > above and clear:
        return "reproduced"
    return "contradicted" if high < above else "not reproduced at this scale"

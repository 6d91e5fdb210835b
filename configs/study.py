"""A study: which runs are trained, what is examined of them, and what analysis answers its question.

``configs/sweeps/NAME.py`` has ``get_study(arg) -> Study``, or the simple form of `configs.trials`;
``python -m tools.launch`` runs it. Nothing here trains: these are the settings, and the rules that they
must obey.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs.base import ConfigError

BEST = ("min", "max")
SOURCE = "{source}"


@dataclasses.dataclass(frozen=True)
class Examination:
    """Probes of a finished run (`eval.run`).

    Attributes:
        probes: their names.
        settings: of them, such as "passkey.keys=32".
        overrides: of the run's config, for what has no parameters: a mitigation that is switched on.
        name: told apart from the other examinations of the run; "" only without overrides.
        calibrated: what is switched on needs values that `eval.calibrate` measures on the run first.
    """

    probes: tuple[str, ...]
    settings: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    name: str = ""
    calibrated: bool = False


@dataclasses.dataclass(frozen=True)
class Arm:
    """One architecture or setting: its runs differ in learning rate and seed alone.

    Each of ``rates`` is trained with the first seed; the best by ``metric`` is trained with the others too.

    Attributes:
        name: names its directory as well.
        config: "configs/NAME.py:ARG"; "{source}" in it stands for the workdir of a run of ``source``.
        overrides: fields of that config and their values.
        factors: what the analysis tells the arms by, such as {"architecture": "mamba2", "d_state": 16}.
        rates: multiples of the config's learning rates (groups that set their own keep it).
        rate_of: the arm whose chosen rate is taken instead, "" for none.
        metric, best: of result.json, by which a rate is chosen; the "min" or the "max" is best.
        seeds: of initialisation and data order.
        source: the arm whose run, of the same seed and the chosen rate, this one starts from.
        examinations: of the runs at the chosen rate.
    """

    name: str
    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    factors: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rates: tuple[float, ...] = (1.0,)
    rate_of: str = ""
    metric: str = "validation/loss"
    best: str = "min"
    seeds: tuple[int, ...] = (0,)
    source: str = ""
    examinations: tuple[Examination, ...] = ()

    @property
    def runs(self) -> int:
        """How many are trained."""
        return len(self.seeds) - 1 + (1 if self.rate_of else len(self.rates))


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms, and the name of the analysis (`eval.studies.ANALYSES`) that reads what became of them.

    Attributes:
        question: a sentence or two, at the head of the report.
        settings: of the analysis.
    """

    name: str
    question: str
    analysis: str
    arms: tuple[Arm, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def runs(self) -> int:
        return sum(arm.runs for arm in self.arms)

    @property
    def examinations(self) -> int:
        """How many there will be, calibrations among them."""
        return sum(
            len(arm.seeds) * (len(arm.examinations) + any(e.calibrated for e in arm.examinations))
            for arm in self.arms
        )

    def validate(self) -> None:
        """Raises ConfigError naming the arm and the field that cannot work."""
        names = [arm.name for arm in self.arms]
        if not names:
            raise ConfigError(f"{self.name} has no arms; give at least one")
        for i, arm in enumerate(self.arms):
            if arm.name in names[:i] or not arm.name or set(arm.name) & set('/\\: "'):
                raise ConfigError(
                    f'{self.name}: arm name {arm.name!r} should be given once, without / \\ : " and blanks'
                )
            for problem in _problems(arm, names[:i]):
                raise ConfigError(f"{self.name}, arm {arm.name}: {problem}")


def _problems(arm: Arm, before: list[str]) -> list[str]:
    found = []
    if arm.best not in BEST:
        found.append(f"best={arm.best!r}, expected one of {BEST}")
    if not arm.rates or min(arm.rates) <= 0 or len(set(arm.rates)) < len(arm.rates):
        found.append(f"rates={arm.rates} should be positive and different, and at least one")
    if not arm.seeds or len(set(arm.seeds)) < len(arm.seeds):
        found.append(f"seeds={arm.seeds} should be different, and at least one")
    for field in ("source", "rate_of"):
        other = getattr(arm, field)
        if other and other not in before:
            found.append(f"{field}={other!r} is no arm before it; there are {before or 'none'}")
    if (SOURCE in arm.config) != bool(arm.source):
        found.append(
            f"config={arm.config!r} and source={arm.source!r}: a source is read where {SOURCE} stands"
        )
    examinations = [examination.name for examination in arm.examinations]
    if len(set(examinations)) < len(examinations):
        found.append(f"the names of its examinations, {examinations}, should be different")
    for examination in arm.examinations:
        if examination.overrides and not examination.name:
            found.append(f"an examination with overrides={examination.overrides} needs a name")
        if not examination.probes:
            found.append(f"examination {examination.name!r} has no probes")
    return found

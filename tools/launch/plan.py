"""The jobs of a study as far as they are known: seeds wait for the learning rate, examinations for runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs import overrides, saved
from configs.base import BaseExperiment, ConfigError
from configs.study import SOURCE, Arm, Examination, Study


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        why: it failed, "" if it did not.
        seconds: that it took, nan where that is not known.
        result: result.json of a training.
        again: it may end better when it is tried again.
        failures: of the last sweep's tries.
    """

    why: str = ""
    seconds: float = math.nan
    result: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    again: bool = False
    failures: int = 0

    @property
    def ok(self) -> bool:
        return not self.why


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of an arm."""

    arm: Arm
    rate: float
    seed: int
    workdir: Path
    config: BaseExperiment
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm.name}/{self.workdir.name}"

    @property
    def work(self) -> float:
        """Positions that it trains on."""
        return self.config.train.steps * self.config.task.batch_size * row_length(self.config)


@dataclasses.dataclass(frozen=True)
class Exam:
    """One examination of a finished run."""

    run: Run
    examination: Examination

    @property
    def name(self) -> str:
        return f"{self.run.name}/eval{self.examination.name and '_' + self.examination.name}"

    @property
    def out(self) -> Path:
        return self.run.workdir / self.name.rpartition("/")[2]

    @property
    def argv(self) -> tuple[str, ...]:
        given, where = self.examination, self.run.workdir
        settings = [f"--set={setting}" for setting in given.settings]
        settings += [f"--override={setting}" for setting in given.overrides]
        settings += [f"--out={self.out}"] if given.name else []
        return ("-m", "eval.run", f"--workdir={where}", f"--probes={','.join(given.probes)}", *settings)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What some examinations of a finished run need (`eval.calibrate`)."""

    run: Run

    @property
    def name(self) -> str:
        return f"{self.run.name}/calibration"

    @property
    def argv(self) -> tuple[str, ...]:
        return ("-m", "eval.calibrate", f"--workdir={self.run.workdir}")


Job = Run | Exam | Calibration


def jobs(study: Study, root: Path, outcomes: Mapping[str, Outcome]) -> Iterator[Job]:
    """Every job that can run now or has run, given how others ended.

    Args:
        outcomes: by the names of jobs.

    Raises:
        ConfigError: a config cannot be made, or a field not be set.
    """
    for arm in study.arms:
        grid = [
            run_of(study, root, arm, rate, arm.seeds[0], outcomes) for rate in _rates(study, arm, outcomes)
        ]
        runs = [run for run in grid if run is not None]
        yield from runs
        rate = chosen(study, arm, outcomes)
        if rate is None:
            continue
        final = [run for run in runs if run.rate == rate]
        for seed in arm.seeds[1:]:
            run = run_of(study, root, arm, rate, seed, outcomes)
            if run is not None:
                final.append(run)
                yield run
        for run in final:
            if _well(run, outcomes):
                yield from _examinations(run, outcomes)


def chosen(study: Study, arm: Arm, outcomes: Mapping[str, Outcome]) -> float | None:
    """The best rate of the arm; None before all have been tried, and where every one has failed."""
    if arm.rate_of:
        return chosen(study, study.arm(arm.rate_of), outcomes)
    if len(arm.rates) == 1:
        return arm.rates[0]
    ended = {rate: outcomes.get(run_name(arm, rate, arm.seeds[0])) for rate in arm.rates}
    if not all(ended.values()):
        return None
    values = {rate: _value(arm, end) for rate, end in ended.items() if end is not None and end.ok}
    if not values:
        return None
    return min(values, key=lambda rate: values[rate])


def run_name(arm: Arm, rate: float, seed: int) -> str:
    return f"{arm.name}/rate{rate:g}_seed{seed}"


def run_of(
    study: Study, root: Path, arm: Arm, rate: float, seed: int, outcomes: Mapping[str, Outcome]
) -> Run | None:
    """One training; None while the run that it starts from is not there."""
    spec = arm.config
    if arm.source:
        before = study.arm(arm.source)
        best = chosen(study, before, outcomes)
        name = None if best is None else run_name(before, best, seed)
        if name is None or name not in outcomes or not outcomes[name].ok:
            return None
        spec = spec.replace(SOURCE, str(root / "runs" / name))
    workdir = root / "runs" / run_name(arm, rate, seed)
    try:
        config, fields = _config(spec, json.dumps(dict(arm.overrides)), arm.name, rate, seed)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"{study.name}, arm {arm.name}: {error}") from error
    flags = [
        f"--config.{name}={value if isinstance(value, str) else repr(value)}"
        for name, value in fields.items()
    ]
    return Run(
        arm, rate, seed, workdir, config, ("train.py", f"--config={spec}", f"--workdir={workdir}", *flags)
    )


def row_length(config: Any) -> int:
    """Tokens of the longest training rows; 1 where the config does not tell."""
    task = config.task
    sizes = getattr(task, "train_sizes", None)  # of recall, each with its length first
    return max(length for length, *_ in sizes) if sizes else getattr(task, "seq_len", None) or 1


def command(job: Job) -> str:
    """As it would be typed."""
    return shlex.join(["python", *job.argv])


def _examinations(run: Run, outcomes: Mapping[str, Outcome]) -> Iterator[Job]:
    calibration = Calibration(run)
    if any(examination.calibrated for examination in run.arm.examinations):
        yield calibration
    for examination in run.arm.examinations:
        if not examination.calibrated or _well(calibration, outcomes):
            yield Exam(run, examination)


def _well(job: Job, outcomes: Mapping[str, Outcome]) -> bool:
    return job.name in outcomes and outcomes[job.name].ok


def _rates(study: Study, arm: Arm, outcomes: Mapping[str, Outcome]) -> list[float]:
    if not arm.rate_of:
        return list(arm.rates)
    rate = chosen(study, arm, outcomes)
    return [] if rate is None else [rate]


@functools.cache
def _config(
    spec: str, given: str, name: str, rate: float, seed: int
) -> tuple[BaseExperiment, dict[str, Any]]:
    """The config of a run, not to be changed, and the fields that differ from ``spec``.

    Args:
        given: the overrides of the arm, as JSON; the learning rates that result are multiplied.
    """
    config = overrides.load(spec)
    fields: dict[str, Any] = json.loads(given) | {"name": name, "train.seed": seed}
    if hasattr(config.task, "seed"):
        fields["task.seed"] = seed
    if rate != 1:
        for field in ("lr", "muon_lr") if config.optim.name == "muon" else ("lr",):
            before = fields.get(f"optim.{field}", getattr(config.optim, field))
            fields[f"optim.{field}"] = float(f"{rate * before:.6g}")
    fields = {field: tuple(v) if isinstance(v, list) else v for field, v in fields.items()}
    config = saved.overridden(config, [f"{field}={json.dumps(value)}" for field, value in fields.items()])
    config.validate()
    return config, fields


def _value(arm: Arm, outcome: Outcome) -> float:
    """The metric of the arm as what is to be small; infinite where it is not finite."""
    value = float(outcome.result[arm.metric])
    value = -value if arm.best == "max" else value
    return value if math.isfinite(value) else math.inf

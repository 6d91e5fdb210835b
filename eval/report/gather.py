"""A run as its directory tells it: config, metrics, results, samples, probes. No checkpoint is opened."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from configs import saved
from configs.base import ConfigError
from eval import arena
from eval.opened import RunError
from runtime import run_record
from tasks import liftoff
from tasks.liftoff import Chance

# Records of training; every other "SET/METRIC" of metrics.jsonl is an evaluation on a held-out set.
OWN = ("train", "speed", "seconds")
COUNT = re.compile(r"^\S+: ([\d,]+) parameters$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What ``RUN/eval/STEP/NAME.json`` holds; ``failure`` says why there is nothing, or is ""."""

    name: str
    step: int
    numbers: Mapping[str, Any]
    curves: Mapping[str, Mapping[str, Any]]
    grids: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        fields: the config's leaves by dotted name, those that an older run did not have at their defaults.
        records: of metrics.jsonl, in the order of steps.
        result: final metrics, with "reference/..." of simple compressors; empty before the end.
        starts: of the run, with machine and versions, oldest first.
        probes: the newest result of each.
        notes: what could not be read.
        chance: of the validation labels of a classification run.
    """

    workdir: str
    config: Mapping[str, Any]
    fields: Mapping[str, Any]
    records: list[dict[str, Any]]
    result: Mapping[str, Any]
    parameters: int | None
    sample: str | None
    starts: list[dict[str, Any]]
    probes: Mapping[str, Probe]
    notes: list[str]
    chance: Chance | None = None

    @property
    def kind(self) -> str:
        """Of experiment: "lm", "classification"; older runs, which did not say, are language models."""
        return str(self.fields.get("kind", "lm"))

    @property
    def name(self) -> str:
        """That the config gives it; its directory's where it gives none."""
        return str(self.fields.get("name", epath.Path(self.workdir).name))

    @property
    def seed(self) -> Any:
        """Of the parameters, None for a run that does not say."""
        return self.fields.get("train.seed")

    @property
    def step(self) -> int:
        """Of the last record."""
        return self.records[-1]["step"]

    @property
    def steps(self) -> int | None:
        """That the run is to have."""
        return self.fields.get("train.steps")

    @property
    def finished(self) -> bool:
        """Whether it had its last step."""
        return self.steps is not None and self.step >= self.steps

    @property
    def stopped(self) -> str:
        """Why the run ended itself before its last step; "" if it did not, or has gone on since."""
        return str(self.result.get("stopped", "")) if self.result.get("step") == self.step else ""

    @property
    def tokens_per_step(self) -> int | None:
        """Positions of a batch, padding included; None for a task without rows of tokens."""
        rows, length = self.fields.get("task.batch_size"), self.fields.get("task.seq_len")
        if self.kind == "classification":
            length = arena.sequence_length(self.fields)
        return rows * length if isinstance(rows, int) and isinstance(length, int) else None

    def curve(self, metric: str) -> dict[int, float]:
        """Value by step; nan where the run recorded a value that is none."""
        return {r["step"]: number(r[metric]) for r in self.records if metric in r}

    def last(self, metric: str) -> float | None:
        """The newest value, or None."""
        curve = self.curve(metric)
        return curve[max(curve)] if curve else None

    def held_out(self) -> list[str]:
        """Names "SET/METRIC" of the evaluations that were recorded."""
        names = {n for r in self.records for n in r if "/" in n and n.split("/")[0] not in OWN}
        return sorted(names)

    def typical(self, metric: str) -> float | None:
        """Median over the records, which a slow moment of the machine does not move."""
        values: Float[np.ndarray, " N"] = np.array(list(self.curve(metric).values()))
        values = values[np.isfinite(values)]
        return float(np.median(values)) if values.size else None

    def seconds(self) -> dict[str, float]:
        """Wall time by activity, with "total", summed over the starts of the run; what is kept of each."""
        total: dict[str, float] = {}
        before: dict[str, float] = {}
        for record in [*self.records, {"seconds/total": -1.0}]:
            if "seconds/total" not in record:
                continue
            now = {n.split("/")[1]: number(v) for n, v in record.items() if n.startswith("seconds/")}
            if now["total"] < before.get("total", 0.0):  # the clock began anew: the run was resumed
                total = {n: total.get(n, 0.0) + before.get(n, 0.0) for n in total | before}
            before = now
        return total


def number(value: Any) -> float:
    """A recorded value as a float: "nan", "inf" and "-inf" stand for what JSON has no numbers for.

    What is no number (null, text) is nan.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def read_run(workdir: epath.PathLike) -> Run:
    """The run in ``workdir``; still in progress is fine.

    Raises:
        RunError: it is no run, or has recorded nothing yet; the message names the file. What else cannot be
            read goes to the run's notes.
    """
    root, notes = epath.Path(workdir), list[str]()
    config = _config(root)
    records = _records(root, notes)
    try:
        starts = run_record.load_environment(root)
    except ValueError as error:
        starts = []
        notes.append(str(error))
    parameters, sample = _text(root / "parameters.txt"), _text(root / "sample.txt")
    counts = COUNT.findall(parameters or "")
    return Run(
        workdir=str(workdir),
        config=config,
        fields=run_record.config_fields(_complete(config)),
        records=records,
        result=_object(root / "result.json", notes),
        parameters=sum(int(count.replace(",", "")) for count in counts) if counts else None,
        sample=sample,
        starts=starts,
        probes=_probes(root / "eval", notes),
        notes=notes,
        chance=_chance(root / liftoff.FILE, notes),
    )


def _chance(path: epath.Path, notes: list[str]) -> Chance | None:
    found = _object(path, notes)
    accuracy, examples = number(found.get("accuracy")), number(found.get("examples"))
    return Chance(accuracy, int(examples)) if 0 <= accuracy <= 1 and examples >= 1 else None


def _text(path: epath.Path) -> str | None:
    return path.read_bytes().decode("utf-8", errors="replace") if path.exists() else None


def _config(root: epath.Path) -> dict[str, Any]:
    """As it is, not as dataclasses: a run of another version can still be reported."""
    if not root.exists():
        raise RunError(f"{root} does not exist; give the --workdir of a training run")
    text = _text(root / "config.json") if root.is_dir() else None
    if text is None:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else "it is a file"
        raise RunError(f"{root} is no run: it has no config.json (found: {there or 'nothing'})")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise RunError(f"{root / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise RunError(f"{root / 'config.json'} holds {text[:40]!r}, expected an object of fields")
    return config


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of fields that were added after the run; unchanged if it has one that is no more."""
    try:
        return json.loads(saved.from_json(json.dumps(config)).to_json())
    except ConfigError:
        return config


def _records(root: epath.Path, notes: list[str]) -> list[dict[str, Any]]:
    """Readable lines of metrics.jsonl, one record a step; others are counted in ``notes``."""
    path = root / "metrics.jsonl"
    text = _text(path)
    if text is None:
        raise RunError(f"{root} has no metrics.jsonl: the run has not started to train")
    if not text.strip():
        raise RunError(f"{path} is empty: the run has recorded no step yet (see train.log_every)")
    by_step: dict[int, dict[str, Any]] = {}
    bad = []
    lines = text.splitlines()
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
            by_step[step] = by_step.get(step, {}) | record | {"step": step}
        except (ValueError, TypeError, KeyError, OverflowError):
            if i < len(lines) or text.endswith("\n"):  # a last line without its end is being written
                bad.append(i)
    if not by_step:
        raise RunError(f"{path}: none of its {len(lines)} lines is a JSON record with a step")
    if bad:
        some = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        notes.append(
            f"{path}: {len(bad)} of {len(lines)} lines are no records and are left out (line {some})"
        )
    return [by_step[step] for step in sorted(by_step)]


def _object(path: epath.Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; empty if there is no file, or (noted) none that can be read."""
    text = _text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        value = error
    if not isinstance(value, dict):
        notes.append(f"{path} is no JSON object and is left out: {str(value)[:80]}")
        return {}
    return value


def _probes(root: epath.Path, notes: list[str]) -> dict[str, Probe]:
    """The result of the newest step of each probe."""
    newest: dict[str, Probe] = {}
    steps = [p for p in root.iterdir() if p.is_dir() and p.name.isdigit()] if root.exists() else []
    for directory in sorted(steps, key=lambda p: int(p.name)):
        for path in sorted(directory.glob("*.json")):
            value = _object(path, notes)
            if not value:
                continue
            numbers, curves, grids = (value.get(kind) or {} for kind in ("numbers", "curves", "grids"))
            failure = next((str(value[k]) for k in ("error", "not_applicable") if value.get(k)), "")
            drawn = [of for kind in (curves, grids) if isinstance(kind, dict) for of in kind.values()]
            if not all(isinstance(part, dict) for part in (numbers, curves, grids, *drawn)):
                notes.append(
                    f'{path}: "numbers", "curves", "grids" and what they draw should be objects; left out'
                )
                continue
            newest[path.stem] = Probe(path.stem, int(directory.name), numbers, curves, grids, failure)
    return newest

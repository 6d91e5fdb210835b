"""What became of a job, as its files tell; nothing else is kept: a study goes on from whatever is there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from etils import epath

from configs import saved
from configs.base import ConfigError
from eval import curves, probes
from eval.calibrated import FILE
from eval.run import is_done
from runtime import run_record
from tools.launch.plan import Calibration, Exam, Job, Outcome, Run

END = 20_000  # bytes of a log's end that are searched for why a job failed
SAID = 400  # characters of an error that are told
ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit|Warning|Failure)\b.*")


def found(job: Job) -> Outcome | None:
    """How the job ended, if its results are there; None if it is to be run, or to go on."""
    if isinstance(job, Calibration):
        return Outcome(seconds=0.0) if (job.run.workdir / FILE).exists() else None
    return _trained(job) if isinstance(job, Run) else _examined(job)


def ended(job: Job, code: int | None, log: Path, seconds: float) -> Outcome:
    """How it ended: well if its results are there, whatever its exit code; else with the error in its log."""
    there = found(job)
    if there is not None:
        return there
    how = "ended" if code is None else f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
    return Outcome(f"{how}, results are missing: {error_of(log)} ({log})", seconds, again=True)


def error_of(log: Path) -> str:
    """The last line of the log's last try that names an error, or the last line."""
    if not log.exists():
        return "it has no log"
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - END, 0))
        text = file.read().decode(errors="replace")
    _, command, said = f"\n{text}".rpartition("\n$ ")
    lines = [line.strip() for line in said.splitlines()[bool(command) :] if line.strip()]
    named = [line for line in lines if ERROR.match(line)]
    return (named or lines or ["it said nothing"])[-1][:SAID]


def failures(root: Path) -> dict[str, Outcome]:
    """Those that the last sweep recorded; they may have been mended since."""
    states = _json(root / "sweep.json") or {}
    return {
        name: Outcome(state["why"], failures=state.get("failures", 0))
        for name, state in states.items()
        if state.get("state") == "failed"
    }


def step_of(run: Run) -> int:
    """That a training has recorded last, 0 if none."""
    path = run.workdir / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:  # the end is enough: records are small
        file.seek(max(path.stat().st_size - 20_000, 0))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _trained(run: Run) -> Outcome | None:
    old = run_record.load_config(run.workdir)
    if old is None:
        return None
    try:
        before = saved.from_json(old, str(run.workdir / "config.json")).to_json()
    except ConfigError as error:
        return Outcome(str(error))
    changes = run_record.explain_config_change(before, run.config.to_json())
    if changes:
        return Outcome(
            f"{run.workdir} was trained with other settings ({'; '.join(changes[:4])}): remove it, or give "
            "another --workdir"
        )
    result = _json(run.workdir / "result.json")
    if not isinstance(result, dict):
        return None
    seconds = _seconds(run.workdir / "metrics.jsonl")
    if run.arm.metric not in result and len(run.arm.rates) > 1:
        there = ", ".join(name for name in result if "/" in name)
        why = f"arm {run.arm.name}: metric={run.arm.metric!r} is not in the results; there are {there}"
        return Outcome(why, seconds)
    return Outcome(seconds=seconds, result=result)


def _examined(exam: Exam) -> Outcome | None:
    """Done if each probe has a record for the last step with these settings, without an error."""
    step = (_json(exam.run.workdir / "result.json") or {}).get("step")
    given = exam.examination
    seconds = 0.0
    for probe in probes.choose(",".join(given.probes), given.settings):
        if not is_done(probe, epath.Path(exam.out / str(step))):
            return None
        record = _json(exam.out / str(step) / f"{probe.name}.json")
        if not record["config"].endswith(", ".join(given.overrides)):
            return None
        seconds += record["seconds"]
    return Outcome(seconds=seconds)


def _seconds(path: Path) -> float:
    """Of the training, over all of its starts."""
    total = last = 0.0
    for record in curves.read_records(path) if path.exists() else []:
        now = record.get("seconds/total", last)
        if now < last:  # the clock began anew: the run was resumed
            total += last
        last = now
    return total + last or math.nan


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None

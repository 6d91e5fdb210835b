"""What a study left, as the records that its analysis reads."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs.base import BaseExperiment
from configs.study import Study
from configs.trials import ANALYSIS
from eval.opened import RunError
from eval.report import of_runs
from eval.report.document import Report, Section
from eval.studies.page import report_of
from eval.studies.trials import ranked
from eval.studies.types import Record
from models.functional import parameter_count
from objectives import model_of
from runtime import run_record
from tools.launch import plan, results
from tools.launch.plan import Exam, Outcome, Run

COMPARED = 8  # trials, the best ones


def report(study: Study, root: Path, outcomes: Mapping[str, Outcome]) -> Report:
    """The report of what there is."""
    known = list(plan.jobs(study, root, outcomes))
    there = records(study, root, outcomes)
    page = report_of(
        study,
        there,
        tried=tried(study, outcomes),
        commands=[plan.command(job) for job in known if job.name in outcomes],
        notes=results.failures(outcomes),
    )
    if study.analysis != ANALYSIS or not there:
        return page
    sections = comparison(there, study.settings["metric"], largest=study.settings["best"] == "max")
    return dataclasses.replace(page, sections=[*page.sections[:-1], *sections, page.sections[-1]])


def comparison(there: Sequence[Record], metric: str, *, largest: bool) -> list[Section]:
    """What `eval.report` shows of the best trials: learning curves, times, what differs."""
    best = ranked(there, metric, largest=largest)[:COMPARED]
    try:
        page = of_runs([record.workdir for arm in best for record in arm])
    except RunError as error:
        return [Section("Comparison", [], f"The runs cannot be compared: {error}")]
    first, *others = page.sections
    lead = f"The best {len(best)} trials. {first.lead}".strip()
    return [dataclasses.replace(first, lead=lead), *(s for s in others if s.title != "Runs and machines")]


def records(study: Study, root: Path, outcomes: Mapping[str, Outcome]) -> list[Record]:
    """Of every run at the chosen rate that has ended well."""
    jobs = list(plan.jobs(study, root, outcomes))
    probes: dict[str, dict[str, dict[str, Any]]] = {}
    for job in jobs:
        if isinstance(job, Exam):
            probes.setdefault(job.run.name, {})[job.examination.name] = _numbers(job)
    sizes: dict[str, tuple[int, int]] = {}
    found = []
    for job in jobs:
        if not isinstance(job, Run) or job.name not in outcomes or not outcomes[job.name].ok:
            continue
        if job.rate != plan.chosen(study, job.arm, outcomes):
            continue
        if job.arm.name not in sizes:  # of all its runs
            sizes[job.arm.name] = size_of(job.config)
        parameters, state = sizes[job.arm.name]
        found.append(
            Record(
                arm=job.arm.name,
                factors=job.arm.factors,
                rate=job.rate,
                seed=job.seed,
                workdir=str(job.workdir),
                parameters=parameters,
                state_scalars=state,
                fields=run_record.config_fields(json.loads(job.config.to_json())),
                result=outcomes[job.name].result,
                probes=probes.get(job.name, {}),
            )
        )
    return found


def tried(study: Study, outcomes: Mapping[str, Outcome]) -> dict[str, dict[float, float | None]]:
    """What each rate of the arms with several gave; None where the run failed."""
    found: dict[str, dict[float, float | None]] = {}
    for arm in study.arms:
        if len(arm.rates) == 1 or arm.rate_of:
            continue
        for rate in arm.rates:
            outcome = outcomes.get(plan.run_name(arm, rate, arm.seeds[0]))
            value = outcome.result.get(arm.metric) if outcome else None
            found.setdefault(arm.name, {})[rate] = None if value is None else float(value)
    return found


def size_of(config: BaseExperiment) -> tuple[int, int]:
    """Parameters, and numbers in the state of one row: N_S of arXiv:2410.07145 (the states of convolutions
    included), to which caches add what they hold at the training length.

    0 for a model without a state.
    """
    model = model_of(config)
    module = model.bind(model.shapes)
    if not hasattr(module, "init_state"):
        return parameter_count(model.shapes), 0
    state = jax.eval_shape(lambda: module.init_state(1, plan.row_length(config)))
    # Integers are positions and ids, which say where a row is and remember nothing of it.
    held = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    numbers = [math.prod(leaf.shape) * (1 + jnp.issubdtype(leaf.dtype, jnp.complexfloating)) for leaf in held]
    return parameter_count(model.shapes), sum(numbers)


def _numbers(exam: Exam) -> dict[str, Any]:
    """Of each probe that has any, from the newest step."""
    found = {}
    steps = [p for p in exam.out.glob("*") if p.name.isdecimal()] if exam.out.exists() else []
    for path in sorted(max(steps, key=lambda p: int(p.name)).glob("*.json")) if steps else []:
        try:
            record = json.loads(path.read_text())
        except ValueError:
            continue
        if "numbers" in record and record.get("probe") in exam.examination.probes:
            found[record["probe"]] = record["numbers"]
    return found

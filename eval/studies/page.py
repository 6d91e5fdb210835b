"""The report of a study: findings beside the papers' statements, what they rest on, and how it was run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from configs.study import Arm, Study
from eval.report import words
from eval.report.document import Report, Section, Table, Text
from eval.studies import ANALYSES
from eval.studies.reading import over_seeds, result
from eval.studies.types import Analysis, Finding, Record

Tried = Mapping[str, Mapping[float, float | None]]  # by arm and rate: the metric that chose
VERDICTS = "A verdict follows from its criterion and from these runs alone."


def report_of(
    study: Study,
    records: Sequence[Record],
    *,
    tried: Tried | None = None,
    commands: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """The page, from whatever records there are; an analysis that cannot read them is a note on it.

    Args:
        tried: what each learning rate gave; those of arms with one rate need not be there.
        commands: of the runs.
        notes: such as what failed.
    """
    notes = list(notes)
    try:
        analysis = ANALYSES[study.analysis](records, study.settings)
    except (KeyError, ValueError) as error:  # records of another version, or too few of them
        analysis = Analysis([], [])
        notes.insert(0, f"The analysis {study.analysis} found nothing it could read: {error}")
    expected = sum(len(arm.seeds) for arm in study.arms)
    if len(records) < expected:
        notes.insert(0, f"{len(records)} of {expected} runs are there; the rest failed, or were not yet run.")
    blocks: list[Table | Text] = [runs_table(study, records, tried or {})]
    if commands:
        blocks.append(Text("Commands", "\n".join(commands), folded=True))
    return Report(
        title=study.name,
        summary=study.question,
        sections=[
            *([findings_section(analysis.findings)] if analysis.findings else []),
            *analysis.sections,
            Section("Runs", blocks, sizes(records)),
        ],
        notes=notes,
        data={
            "study": dataclasses.asdict(study),
            "findings": [dataclasses.asdict(finding) for finding in analysis.findings],
            "records": [dataclasses.asdict(record) for record in records],
            "tried": {
                arm: {f"{rate:g}": v for rate, v in rates.items()} for arm, rates in (tried or {}).items()
            },
        },
    )


def findings_section(findings: Sequence[Finding]) -> Section:
    """A row for each statement."""
    rows = [[f.verdict, f.claim, f.found, f.criterion] for f in findings]
    return Section(
        "Findings",
        [Table(["verdict", "published", "found here", "criterion"], rows, numeric=False)],
        VERDICTS,
    )


def runs_table(study: Study, records: Sequence[Record], tried: Tried) -> Table:
    """A row for each arm."""
    header = ["arm", "parameters", "state", "seeds", "rate", "rates tried", "metric", "value"]
    return Table(header, [_row(arm, records, tried.get(arm.name, {})) for arm in study.arms], RATES)


RATES = (
    "State: numbers in the recurrent state; caches of attention at the training length. Rate: multiple of "
    "the config's learning rates, chosen with the first seed by the metric. ± is the sample standard "
    "deviation over seeds."
)


def sizes(records: Sequence[Record]) -> str:
    """How far the parameter counts lie apart."""
    counts = sorted({record.parameters for record in records})
    if not counts:
        return ""
    apart = 100 * (counts[-1] / counts[0] - 1)
    return f"{words.count(counts[0])} to {words.count(counts[-1])} parameters, {apart:.1f} % apart."


def _row(arm: Arm, records: Sequence[Record], tried: Mapping[float, Any]) -> list[str]:
    mine = [record for record in records if record.arm == arm.name]
    grid = ", ".join(
        f"{rate:g}: {'failed' if value is None else f'{value:.4g}'}" for rate, value in tried.items()
    )
    if not mine:
        return [arm.name, *[words.MISSING] * 4, grid or "one", arm.metric, words.MISSING]
    first = mine[0]
    return [
        arm.name,
        words.count(first.parameters),
        words.count(first.state_scalars),
        ", ".join(str(record.seed) for record in mine),
        f"{first.rate:g}",
        grid or (f"as {arm.rate_of}" if arm.rate_of else "one"),
        arm.metric,
        words.plus_minus(over_seeds(mine, result(arm.metric)), 4),
    ]

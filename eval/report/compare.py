"""The report of one or several runs: their tables, curves, probes, samples and configs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report import labels, probes, tokens, words
from eval.report.document import Report, Section, Table, Text
from eval.report.gather import Run
from eval.report.groups import Group, Statistic, group_runs, material, mean_of, statistic
from eval.report.kind import Kind

KINDS: Mapping[str, Kind] = {
    "lm": tokens.KIND,
    "classification": labels.KIND,
    "hmt": tokens.KIND,
    "beacon": tokens.KIND,
}
ACTIVITIES = ("compile", "data", "step", "eval", "checkpoint", "other", "total")
SAMPLE_LIMIT = 4000  # characters shown of one sample


def compare(runs: Sequence[Run], unreadable: Mapping[str, str] | None = None) -> Report:
    """The report of ``runs``, at least one.

    Args:
        unreadable: why, by directory, for those that could not be read.
    """
    kinds = [KINDS.get(run.kind, tokens.KIND) for run in runs]
    kind = kinds[0] if all(other is kinds[0] for other in kinds) else tokens.KIND
    groups, metrics = group_runs(runs), kind.metrics_of(runs)
    sections = [
        Section("Comparison" if len(groups) > 1 else "Result", kind.tables(groups, metrics)),
        *kind.sections(groups),
        Section("Learning curves", kind.curves(groups, metrics)),
        *probes.probe_sections(groups),
        Section("Wall time", [time_table(groups)]),
        Section("Samples", samples(groups)),
        config_section(groups),
        Section("Runs and machines", [runs_table(groups)]),
    ]
    names = words.listed([group.label for group in groups])
    return Report(
        title=names if len(names) < 80 else f"{len(groups)} architectures compared",
        summary=kind.summary(groups, metrics),
        sections=[section for section in sections if section.blocks or section.lead],
        notes=[
            *(f"Unreadable: {why}" for why in (unreadable or {}).values()),
            *notes(groups),
            *kind.notes(groups),
        ],
        data={
            "architectures": [{**_architecture(group, metrics), **kind.numbers(group)} for group in groups],
            "runs": [_run(group, run) for group in groups for run in group.runs],
            "unreadable": dict(unreadable or {}),
        },
    )


def time_table(groups: Sequence[Group]) -> Table:
    """Mean seconds of each activity."""
    rows = []
    for group in groups:
        clocks = [run.seconds() for run in group.furthest]
        values = [Statistic.of([c[activity] for c in clocks if activity in c]) for activity in ACTIVITIES]
        rows.append([group.label, *(words.duration(mean_of(v)) for v in values)])
    caption = (
        "Mean over seeds, up to the last training record: the evaluation after the last step comes later. "
        "Work that an interruption undid is not counted."
    )
    return Table(["architecture", *ACTIVITIES], rows, caption, colours=[group.colour for group in groups])


def samples(groups: Sequence[Group]) -> list[Text]:
    """The first sample of each architecture."""
    blocks = []
    for group in groups:
        run = next((run for run in group.runs if run.sample is not None), None)
        if run is not None and run.sample is not None:
            cut = run.sample[:SAMPLE_LIMIT] + (" …" if len(run.sample) > SAMPLE_LIMIT else "")
            blocks.append(Text(f"{group.label}, seed {run.seed}", cut))
    return blocks


def config_section(groups: Sequence[Group]) -> Section:
    """The fields that differ side by side, and every config in full."""
    fields = [material(group.runs[0]) for group in groups]
    names = [n for n in sorted(set().union(*fields)) if len({_shown(f, n) for f in fields}) > 1]
    blocks: list[Table | Text] = []
    if len(groups) > 1:
        rows = [[name, *(_shown(f, name) for f in fields)] for name in names]
        blocks.append(
            Table(["field", *(group.label for group in groups)], rows, "Only what differs.", numeric=False)
        )
    for group in groups:
        title = f"Config of {group.label}" + (", first run" if len(group.runs) > 1 else "")
        blocks.append(Text(title, json.dumps(group.runs[0].config, indent=2), folded=True))
    return Section("Config", blocks)


def runs_table(groups: Sequence[Group]) -> Table:
    """One row a run: where it is, its seed, how far it is, and what it ran on."""
    header = ["directory", "architecture", "seed", "step", "device", "cores", "versions"]
    rows = []
    for group in groups:
        for run in group.runs:
            steps = "?" if run.steps is None else str(run.steps)
            done = steps if run.finished else f"{run.step} of {steps}"
            rows.append([run.workdir, group.label, str(run.seed), done, *_machine(run)])
    return Table(header, rows, numeric=False)


def notes(groups: Sequence[Group]) -> list[str]:
    """What limits the comparison, and what could not be read."""
    found = []
    for group in groups:
        seeds = [(run.seed, run.fields.get("task.seed")) for run in group.runs]
        if len(set(seeds)) < len(seeds):
            found.append(f"{group.label}: a seed occurs twice, so the spread is not over seeds alone.")
        for run in group.runs:
            if run.stopped:
                found.append(f"{run.workdir} ended at step {run.step} of {run.steps}: {run.stopped}.")
            elif not run.finished:
                found.append(f"{run.workdir} was at step {run.step} of {run.steps} when it was read.")
            if not run.held_out():
                found.append(f"{run.workdir} has recorded no evaluation on held-out data.")
            found += run.notes
    if len({run.step for group in groups for run in group.runs}) > 1:
        found.append("The runs are at different steps: final values are not of equal training.")
    kinds = sorted({run.kind for group in groups for run in group.runs})
    if len({id(KINDS.get(kind)) for kind in kinds}) > 1:
        found.append(f"The runs are of kinds {words.listed(kinds)}: their metrics do not compare.")
    return found


def _shown(fields: Mapping[str, Any], name: str) -> str:
    return json.dumps(fields[name]) if name in fields else "no such field"


def _machine(run: Run) -> list[str]:
    """Device, cores and versions of the last start."""
    if not run.starts:
        return [words.MISSING] * 3
    last = run.starts[-1]
    machines = {(s.get("device"), s.get("devices"), s.get("cores")) for s in run.starts}
    device = f"{last.get('devices', '?')} x {last.get('device', '?')}"
    versions = last.get("versions") or {}
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "flax") if name in versions)
    moved = "" if len(machines) == 1 else f" (last of {len(machines)} machines)"
    return [device + moved, str(last.get("cores", words.MISSING)), shown or words.MISSING]


def _architecture(group: Group, metrics: Sequence[str]) -> dict[str, Any]:
    """Numbers of one group, for report.json."""

    def plain(found: Statistic | None) -> dict[str, Any] | None:
        return dataclasses.asdict(found) if found else None

    return {
        "label": group.label,
        "runs": [run.workdir for run in group.runs],
        "seeds": [run.seed for run in group.runs],
        "held_out": {metric: plain(group.last(metric)) for metric in metrics},
        "tokens_per_second": plain(statistic(group.runs, lambda run: run.typical("speed/tokens_per_second"))),
        "mfu": plain(statistic(group.runs, lambda run: run.typical("speed/mfu"))),
    }


def _run(group: Group, run: Run) -> dict[str, Any]:
    """Numbers of one run, for report.json."""
    return {
        "workdir": run.workdir,
        "architecture": group.label,
        "seed": run.seed,
        "step": run.step,
        "steps": run.steps,
        "parameters": run.parameters,
        "tokens_seen": run.tokens_per_step and run.tokens_per_step * run.step,
        "seconds": run.seconds(),
        "result": run.result,
        "probes": {
            p.name: {"step": p.step, "numbers": p.numbers, "failure": p.failure} for p in run.probes.values()
        },
        "starts": run.starts,
        "config": run.config,
    }

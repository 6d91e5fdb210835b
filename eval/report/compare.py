"""The report of one or several runs: their tables, curves, probes, samples and configs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report import lines, probes, words
from eval.report.document import Report, Section, Table, Text
from eval.report.gather import Run, number
from eval.report.groups import Group, Statistic, group_runs, material, mean_of, statistic

LOWER_IS_BETTER = ("bits_per_byte", "loss")
ACTIVITIES = ("compile", "data", "step", "eval", "checkpoint", "other", "total")
SAMPLE_LIMIT = 4000  # characters shown of one sample


def compare(runs: Sequence[Run], unreadable: Mapping[str, str] | None = None) -> Report:
    """The report of ``runs``, at least one.

    Args:
        unreadable: why, by directory, for those that could not be read.
    """
    groups, metrics = group_runs(runs), held_out_metrics(runs)
    sections = [
        Section("Comparison" if len(groups) > 1 else "Result", comparison_tables(groups, metrics)),
        Section("Learning curves", lines.learning_curves(groups, metrics)),
        *probes.probe_sections(groups),
        Section("Wall time", [time_table(groups)]),
        Section("Samples", samples(groups)),
        config_section(groups),
        Section("Runs and machines", [runs_table(groups)]),
    ]
    labels = words.listed([group.label for group in groups])
    return Report(
        title=labels if len(labels) < 80 else f"{len(groups)} architectures compared",
        summary=summary(groups, metrics),
        sections=[section for section in sections if section.blocks or section.lead],
        notes=[*(f"Unreadable: {why}" for why in (unreadable or {}).values()), *notes(groups)],
        data={
            "architectures": [_architecture(group, metrics) for group in groups],
            "runs": [_run(group, run) for group in groups for run in group.runs],
            "unreadable": dict(unreadable or {}),
        },
    )


def held_out_metrics(runs: Sequence[Run]) -> list[str]:
    """Of the evaluations, bits per byte rather than loss where a set has both; "validation" comes first."""
    names = {name for run in runs for name in run.held_out()}
    kept = {n for n in names if not (n.endswith("/loss") and f"{n[:-5]}/bits_per_byte" in names)}
    return sorted(kept, key=lambda n: (not n.startswith("validation/"), not n.endswith(LOWER_IS_BETTER), n))


def summary(groups: Sequence[Group], metrics: Sequence[str]) -> str:
    """What was trained, and the best of it beside the references."""
    runs = [run for group in groups for run in group.runs]
    sources = sorted({str(s) for run in runs if (s := run.fields.get("task.source")) is not None})
    what = f"{words.plural(len(groups), 'architecture')}, {words.plural(len(runs), 'run')}"
    if len(groups) == 1:
        parameters, seen, _ = _sizes(groups[0])
        what = (
            f"{words.plural(len(runs), 'run')} of {_shape(runs[0])} ({parameters} parameters, {seen} tokens)"
        )
    said = [f"{what}, trained on {words.listed(sources)}." if sources else f"{what}."]
    best = _best(groups, metrics[0]) if metrics else None
    if best is not None:
        value = ", ".join(_measured(best, metrics[0]).splitlines())
        measured = f"{words.metric(metrics[0])}: {value}"
        said.append(
            f"Lowest {measured} ({best.label})."
            if len(groups) > 1
            else f"{measured[:1].upper()}{measured[1:]}."
        )
        references = lines.references(groups)
        if references and metrics[0] == "validation/bits_per_byte":
            name, bits = min(references.items(), key=lambda item: item[1])
            said.append(f"The strongest reference on the same text: {name}, {bits:.3f}.")
    elif not metrics:
        said.append("No evaluation on held-out data has been recorded yet.")
    going = sum(not run.finished for run in runs)
    if going:
        said.append(f"{going} of {words.plural(len(runs), 'run')} had not reached the last step when read.")
    return " ".join(said)


def comparison_tables(groups: Sequence[Group], metrics: Sequence[str]) -> list[Table]:
    """One row an architecture, and the references of the same text."""
    header = ["architecture", *([words.metric(metric) for metric in metrics] or ["validation"])]
    header += ["layers", "parameters", "tokens seen", "seeds", "tokens/s", "MFU", "wall time", "peak memory"]
    rows, best = [], []
    for i, group in enumerate(groups):
        measured = [_measured(group, metric) for metric in metrics] or [words.MISSING]
        for j, metric in enumerate(metrics):
            if len(groups) > 1 and _best(groups, metric) is group:
                best.append((i, 1 + j))
        rows.append([group.label, *measured, _shape_lines(group.runs[0]), *_sizes(group), *_costs(group)])
    caption = (
        "± is the sample standard deviation over seeds. Tokens seen count every position of the batches. "
        "Tokens/s and MFU are medians over training; on a CPU, MFU is relative to its measured matmul rate."
    )
    table = Table(header, rows, caption, best=best, colours=[group.colour for group in groups])
    found = lines.references(groups)
    if not found:
        return [table]
    rows = [[name, f"{value:.3f}"] for name, value in sorted(found.items(), key=lambda item: -item[1])]
    return [table, Table(["reference on the same text", "bits per byte"], rows)]


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
            if not run.finished:
                found.append(f"{run.workdir} was at step {run.step} of {run.steps} when it was read.")
            if not run.held_out():
                found.append(f"{run.workdir} has recorded no evaluation on held-out data.")
            found += run.notes
    if len({run.step for group in groups for run in group.runs}) > 1:
        found.append("The runs are at different steps: final values are not of equal training.")
    return found


def _best(groups: Sequence[Group], metric: str) -> Group | None:
    """The group with the lowest mean, where lower is better."""
    if not metric.endswith(LOWER_IS_BETTER):
        return None
    means = [(value.mean, i) for i, group in enumerate(groups) if (value := group.last(metric)) is not None]
    finite = [pair for pair in means if pair[0] == pair[0]]
    return groups[min(finite)[1]] if finite else None


def _shape(run: Run, between: str = ", ") -> str:
    """Layer pattern and width."""
    pattern, width = run.fields.get("model.pattern"), run.fields.get("model.d_model")
    return words.MISSING if pattern is None else f"{pattern}{between}width {width}"


def _shape_lines(run: Run) -> str:
    """In lines of bounded width, since a pattern of a hundred layers has no good place to break."""
    parts = _shape(run, "\n").splitlines()
    return "\n".join(line[i : i + 24] for line in parts for i in range(0, len(line), 24))


def _measured(group: Group, metric: str) -> str:
    """The newest value; said if it is not of the end of training, or not of all runs."""
    value, step = group.last(metric), group.last_step(metric)
    if value is None:
        return words.MISSING
    text = words.plus_minus(value)
    if step != group.runs[0].steps:
        text += f"\nat step {step}"
    if len(value.values) < len(group.runs):
        text += f"\n{len(value.values)} of {words.plural(len(group.runs), 'run')}"
    return text


def _sizes(group: Group) -> tuple[str, str, str]:
    """Parameters, tokens seen, seeds."""
    seen = statistic(group.furthest, lambda run: run.tokens_per_step and run.tokens_per_step * run.step)
    counts = sorted({run.parameters for run in group.runs if run.parameters is not None})
    parameters = " / ".join(map(words.count, counts)) or words.MISSING
    return parameters, words.count(mean_of(seen)), ", ".join(str(run.seed) for run in group.runs)


def _costs(group: Group) -> list[str]:
    """Tokens per second, MFU, wall time, peak memory."""
    speed = statistic(group.runs, lambda run: run.typical("speed/tokens_per_second"))
    use = statistic(group.runs, lambda run: run.typical("speed/mfu"))
    wall = statistic(group.furthest, lambda run: run.seconds().get("total"))
    peaks = []
    for where in ("device", "host"):
        name = f"memory/{where}_peak_bytes"
        found = [number(run.result[name]) for run in group.runs if name in run.result]
        peaks += [f"{words.memory(max(found))} {where}"] if found else []
    return [
        words.MISSING if speed is None else f"{speed.mean:,.0f}",
        words.MISSING if use is None else f"{100 * use.mean:.1f}{words.GLUE}%",
        words.duration(mean_of(wall)),
        ", ".join(peaks) or words.MISSING,
    ]


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

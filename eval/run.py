"""Examine a checkpoint: ``python -m eval.run --workdir=RUN [--step=N] [--probes=bits_per_byte,...]``.

Each probe leaves RUN/eval/STEP/NAME.json, a picture beside it, and NAME.npz if it has long arrays. With
``--watch`` every new checkpoint of a run in training is examined as it appears. The probes are in
``eval/probes``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Column, Table

from configs.base import ConfigError
from configs.saved import overridden
from eval.opened import OpenRun, RunError, load_config, open_run
from eval.probes import PROBES, choose
from eval.probes.types import NotApplicable, Probe, Say
from runtime.checkpoint import ArchitectureError, CheckpointError, Checkpoints
from runtime.host import restart_with_tuned_malloc
from runtime.run_record import replace_text

Record = dict[str, Any]  # one NAME.json


def examine(
    opened: OpenRun, probes: Sequence[Probe], out: epath.PathLike | None = None, say: Say = print
) -> list[Record]:
    """Run every probe and write what it leaves; one that fails does not keep the others from running.

    Args:
        out: where to, in a folder named by the step; None for the run's own ``eval``.

    Returns:
        The records as written. Each has "probe", "config", "step", "date", "device", "settings" and
        "seconds", and "numbers" and "curves"; or "not_applicable", why this run has nothing to measure; or
        "error" and "traceback".
    """
    directory = results_directory(opened.workdir, out) / str(opened.step)
    directory.mkdir(parents=True, exist_ok=True)
    records = []
    for probe in probes:
        record, files = _run(probe, opened, say)
        replace_text(directory / f"{probe.name}.json", json.dumps(record, indent=1) + "\n")
        for suffix, content in files.items():
            _replace_file(directory / f"{probe.name}.{suffix}", content)
        for problem in ("error", "not_applicable"):
            if problem in record:
                say(f"{probe.name}: {problem.replace('_', ' ')}: {record[problem]}")
        records.append(record)
    return records


def watch(
    workdir: epath.PathLike,
    probes: Sequence[Probe],
    out: epath.PathLike | None = None,
    say: Say = print,
    *,
    poll: float = 30.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[list[Record]]:
    """The records of each checkpoint, oldest first, as checkpoints appear, until the run has all its steps.

    Probes that have a result for a step, with the same settings and without an error, are not run again. A
    checkpoint that is deleted before its turn, or cannot be read, is told of and passed over.

    Args:
        poll: seconds between looks.
        sleep: waits that long; replaced in tests.

    Raises:
        RunError, ConfigError, ArchitectureError: as ``eval.opened.open_run``; a run without checkpoints is
            waited for.
    """
    opened: OpenRun | None = None
    seen: set[int] = set()
    while True:
        config, steps = load_config(workdir), _steps(workdir)
        for step in sorted(set(steps) - seen):
            seen.add(step)
            directory = results_directory(workdir, out) / str(step)
            missing = [probe for probe in probes if not is_done(probe, directory)]
            if not missing:
                say(f"step {step}: already examined")
                continue
            try:
                opened = _open_next(workdir, step, opened)
            except (RunError, CheckpointError) as error:
                gone = step not in _steps(workdir)
                why = "it was deleted before its turn (checkpoint.keep_last)" if gone else str(error)
                say(f"step {step}: passed over: {why}")
                continue
            yield examine(opened, missing, out, say)
        if steps and steps[-1] >= config.train.steps:
            return
        sleep(poll)


def results_directory(workdir: epath.PathLike, out: epath.PathLike | None = None) -> epath.Path:
    """Where results lie, in folders named by steps."""
    return epath.Path(workdir) / "eval" if out is None else epath.Path(out)


def is_done(probe: Probe, directory: epath.Path) -> bool:
    """Whether ``directory``, of a step, has a result of ``probe`` with its settings, without an error."""
    try:
        record = json.loads((directory / f"{probe.name}.json").read_text())
    except (OSError, ValueError):
        return False
    return "error" not in record and record.get("settings") == _settings(probe)


def summary(records: Sequence[Record]) -> Table:
    """The numbers that are scalars, and flat dicts of scalars, as a table."""
    title = "{config}, step {step}".format(**records[0])
    table = Table("probe", Column("number", overflow="fold"), "value", title=title, title_justify="left")
    for record in records:
        for i, (name, value) in enumerate(_shown(record)):
            table.add_row("" if i else record["probe"], name, value)
        table.add_section()
    return table


def _run(probe: Probe, opened: OpenRun, say: Say) -> tuple[Record, dict[str, bytes]]:
    """The record of one probe and its other files by suffix (empty for none), whatever happens in it."""
    picture, arrays, begin = io.BytesIO(), io.BytesIO(), time.perf_counter()
    record: Record = {
        "probe": probe.name,
        "config": opened.config.name,
        "step": opened.step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": opened.mesh.devices.flat[0].device_kind,
        "settings": _settings(probe),
    }
    precision = opened.config.train.matmul_precision
    try:
        with jax.set_mesh(opened.mesh), jax.default_matmul_precision(precision):
            result = probe.run(opened, lambda text: say(f"{probe.name}: {text}"))
        record |= {"numbers": _plain(result.numbers)}
        for kind, drawn in (("curves", result.curves), ("grids", result.grids)):
            record[kind] = {name: _plain(dataclasses.asdict(one)) for name, one in drawn.items()}
        if result.arrays:
            np.savez_compressed(arrays, **result.arrays)  # type: ignore[arg-type]  # one is a name of its own
        if figure := probe.plot(result):
            figure.savefig(picture, format="png")
    except NotApplicable as reason:
        record["not_applicable"] = str(reason)
    except Exception as error:  # whatever it is, the other probes can still run
        record["error"] = f"{type(error).__name__}: {error}"
        record["traceback"] = traceback.format_exception(error, limit=-5)
    seconds = round(time.perf_counter() - begin, 3)
    return {**record, "seconds": seconds}, {"png": picture.getvalue(), "npz": arrays.getvalue()}


def _replace_file(path: epath.Path, content: bytes) -> None:
    """Write it as a whole; without any, remove that of an earlier result."""
    if not content:
        path.unlink(missing_ok=True)
        return
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content)
    temporary.replace(path)


def _open_next(workdir: epath.PathLike, step: int, before: OpenRun | None) -> OpenRun:
    """The run at ``step``, with the model of ``before`` if it is the same: nothing is compiled again."""
    opened = open_run(workdir, step)
    if before is not None and before.config == opened.config:
        return dataclasses.replace(opened, model=before.model)
    return opened


def _steps(workdir: epath.PathLike) -> list[int]:
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.steps()


def _settings(probe: Probe) -> dict[str, Any]:
    return _plain(dataclasses.asdict(probe))  # type: ignore[call-overload]  # a protocol cannot ask for fields


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: lists for arrays and tuples, strings for what is not finite."""
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shown(record: Record) -> Iterator[tuple[str, str]]:
    for problem in ("error", "not_applicable"):
        if problem in record:
            yield problem.replace("_", " "), record[problem]
    for name, value in record.get("numbers", {}).items():
        if isinstance(value, dict) and not any(isinstance(inner, (dict, list)) for inner in value.values()):
            if value:
                yield name, "  ".join(f"{key} {_number(inner)}" for key, inner in value.items())
        elif not isinstance(value, (dict, list)):
            yield name, _number(value)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m eval.run", allow_abbrev=False)
    add = options.add_argument
    add("--workdir", required=True, help="directory of the run")
    add("--step", type=int, help="checkpoint to examine (default: the newest)")
    add("--probes", default="all", help=f"comma-separated, or all: {', '.join(PROBES)}")
    add("--set", action="append", default=[], metavar="PROBE.SETTING=VALUE", help="repeat it for several")
    add("--out", help="directory for the results (default: RUN/eval)")
    add(
        "--override",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of the run's config, for what has no parameters (model.memory.recall=none); needs --out",
    )
    add("--watch", action="store_true", help="examine each checkpoint as it appears, until the last")
    add("--poll", type=float, default=30.0, help="seconds between looks for a new checkpoint")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    given = options.parse_args(argv)
    if given.watch and given.step is not None:
        options.error("--watch examines every checkpoint; give --step or --watch, not both")
    if given.override and (given.watch or not given.out):
        options.error("--override examines another model than the run's: it needs --out, and no --watch")
    if given.poll <= 0:
        options.error(f"--poll={given.poll} should be positive")
    say = Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print
    failed = False
    try:
        probes = choose(given.probes, given.set)
        if given.watch:
            batches = watch(given.workdir, probes, given.out, say, poll=given.poll)
        else:
            config = None
            if given.override:
                config = overridden(load_config(given.workdir), given.override)
                config.name = ", ".join([config.name, *given.override])
            opened = open_run(given.workdir, given.step, config=config)
            batches = iter([examine(opened, probes, given.out, say)])
        with contextlib.suppress(KeyboardInterrupt):
            for records in batches:
                Console().print(summary(records))
                failed |= any("error" in record for record in records)
    except (RunError, ConfigError, ArchitectureError, CheckpointError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()

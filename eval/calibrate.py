"""Measure what switches on a trained model need: ``python -m eval.calibrate --workdir=RUN``.

Reads rows of the training text and writes RUN/calibration.npz: for every Mamba and Mamba-2 layer the step
sizes below which LongMamba skips tokens, and the norms that states reach within the training length. Then
``model.mamba2.dt_filter.scale`` and ``model.mamba2.mitigation.state_norm`` can be set (``eval.run`` has
``--override`` for it).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int

from configs.base import ConfigError
from configs.saved import overridden
from eval.calibrated import FILE, save
from eval.opened import OpenRun, RunError, load_config, open_run
from eval.probes.scoring import task_of
from eval.probes.types import NotApplicable
from layers import longmamba
from layers.dynamics import Dynamics
from layers.state_limits import capped_ssd
from layers.types import Context
from models.walk import embed, is_plain, walk
from runtime.checkpoint import ArchitectureError, CheckpointError
from runtime.host import restart_with_tuned_malloc
from tasks.lm import LMTask

KINDS = ("mamba", "mamba2")
ROWS = 8  # read at once
Values = dict[str, np.ndarray]  # of a layer, by the name of the parameter within its mixer
SWITCHES = ("mamba2.dt_filter.scale", "mamba2.mitigation.state_norm", "mamba.dt_filter.scale")


def calibrate(opened: OpenRun, slices: int = 64, share: float = 0.05) -> dict[str, np.ndarray]:
    """The values by the names of the parameters they are for.

    Args:
        opened: the run, with nothing switched on that needs calibration.
        slices: rows of training text that are averaged over (of the norms, the largest is taken).
        share: of the tokens, those with the largest step sizes count as the smallest of them (LongMamba).

    Raises:
        RunError: a model without such a layer, or with a memory around it; no rows without padding.
    """
    model = opened.model.bind(opened.model.shapes)
    kinds = [symbol for symbol in model.config.layers if symbol in "mM"] if is_plain(model) else []
    if not kinds:
        raise RunError(f"{opened.workdir}: the run is no language model with a Mamba or Mamba-2 layer")
    rows = _rows(task_of(opened), slices, opened)
    measure = _measure(opened, share)
    batches = [measure(opened.params, rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
    weights = np.array([len(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)])
    layers = [
        {
            name: np.max(values, axis=0)
            if name == "norm_cap"
            else np.average(values, axis=0, weights=weights)
            for name, values in _by_name(parts).items()
        }
        for parts in zip(*jax.device_get(batches))
    ]
    return _placed(opened, layers)


def _rows(task: LMTask, slices: int, opened: OpenRun) -> Int[np.ndarray, "n L"]:
    """Rows of the training batches without padding."""
    found: list[np.ndarray] = []
    count, data = 0, task.train()
    for step in range(max(slices, 1)):
        batch = data[step]
        full = batch["tokens"][(batch["segment_ids"] != 0).all(axis=1)]
        found, count = [*found, full], count + len(full)
        if count >= slices:
            break
    if not count:
        raise RunError(f"{opened.workdir}: {slices} training batches have no row without padding")
    return np.concatenate(found)[:slices]


def _measure(opened: OpenRun, share: float) -> Callable[[Any, Any], list[dict[str, Array]]]:
    """``(params, tokens [B, L]) -> values`` of every sub-layer, empty for those of other kinds."""

    @jax.jit
    def measure(params: Any, tokens: Int[Array, "B L"]) -> list[dict[str, Array]]:
        lm, ctx = opened.model.bind(params), Context.create(*tokens.shape)
        return [
            _values(visit.mixer.dynamics(visit.inner, None, ctx), visit.kind, share)
            if visit.kind in KINDS
            else {}
            for visit in walk(lm, embed(lm, tokens, ctx), ctx)
        ]

    return measure


def _values(dynamics: Dynamics, kind: str, share: float) -> dict[str, Array]:
    x, dt, A, B, C = dynamics
    values = {
        "dt_filter/thresholds": longmamba.table(dt, share),
        "dt_filter/retention": longmamba.retention(dt, A, share),
        "dt_filter/base": jnp.full(1, dt.shape[1], jnp.float32),
    }
    if kind == "mamba2":
        u, unbounded = dt[..., None] * x, jnp.full(dt.shape[2], jnp.inf, dt.dtype)
        _, _, squares = capped_ssd(u, dt * A[:, 0], B, C, unbounded)
        values["norm_cap"] = jnp.sqrt(squares.max(axis=(0, 1)))
    return values


def _by_name(parts: Sequence[Values]) -> dict[str, list[np.ndarray]]:
    return {name: [part[name] for part in parts] for name in parts[0]}


def _placed(opened: OpenRun, layers: Sequence[Values]) -> dict[str, np.ndarray]:
    """The layers' values as parameters, those of repeated layers stacked."""
    placed, done = dict[str, np.ndarray](), 0
    for number, run in enumerate(opened.model.bind(opened.model.shapes).backbone.runs):
        size = len(run.layers)
        for j in range(size):
            repeats = [layers[done + j + size * i] for i in range(run.repeats)]
            for name in repeats[0]:
                path = f"backbone/runs/{number}/layers/{j}/mixer/{name}"
                values = np.stack([repeat[name] for repeat in repeats])
                placed[path] = np.asarray(values if run.repeats > 1 else values[0], np.float32)
        done += size * run.repeats
    return placed


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m eval.calibrate", allow_abbrev=False)
    add = options.add_argument
    add("--workdir", required=True, help="directory of the run; calibration.npz is written there")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--slices", type=int, default=64, help="rows of training text to average over")
    add("--share", type=float, default=0.05, help="share of the step sizes clamped at the smallest of them")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    given = options.parse_args(argv)
    if given.slices < 1 or not 0 < given.share < 1:
        options.error("--slices should be at least 1 and --share lie between 0 and 1")
    try:
        off = [f"model.{field}=null" for field in SWITCHES]
        opened = open_run(given.workdir, given.step, config=overridden(load_config(given.workdir), off))
        values = calibrate(opened, given.slices, given.share)
        file = epath.Path(given.workdir) / FILE
        save(file, values)
    except (
        RunError,
        NotApplicable,
        ConfigError,
        ArchitectureError,
        CheckpointError,
        ValueError,
        OSError,
    ) as e:
        sys.exit(f"{type(e).__name__}: {e}")
    for line in summary(values):
        print(line)
    print(f"{file}: {len(values)} arrays, from step {opened.step}")


def summary(values: Values) -> Iterator[str]:
    """A line a layer: how many channels are global, and the largest norm of a state."""
    default = longmamba.DtFilterConfig().min_retention
    for name, array in values.items():
        if name.endswith("retention"):
            yield f"{name}: {int((array > default).sum())} of {array.size} channels are global (> {default})"
        elif name.endswith("norm_cap"):
            yield f"{name}: {array.min():.3g} to {array.max():.3g}"


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()

"""Loss against the condensing ratio of Activation Beacon, between full attention and no memory at all."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool
from matplotlib.figure import Figure

from configs.beacon import BeaconExperiment
from eval.opened import OpenRun
from eval.probes.plot import plot_curves
from eval.probes.scoring import UNITS, Pair, long_rows, means, rows_available, score, task_of
from eval.probes.types import Curve, NotApplicable, ProbeResult, Say
from objectives import model_of
from tasks.lm import LMTask
from tasks.types import Batch


@dataclasses.dataclass(frozen=True)
class Condensing:
    """The same validation rows at every ratio, and at the two ends of what a memory can do.

    * ``full``: the backbone without beacons, which sees all of a row;
    * ``ratio_N``: windows condensed N times;
    * ``truncated``: the backbone without beacons, which sees the tokens of the window alone.

    The mean is over the targets after a row's first window, where these differ. ``lost`` is the share of what
    the context before the window gives that condensing loses: 0 at ``full``, 1 at ``truncated``. ``kv_bytes``
    are those of a row's caches.

    Attributes:
        ratios: () for those of training.
        factor: length of the rows in training lengths.
        rows, min_rows: how many rows are taken at most, and how many are enough.
    """

    name: ClassVar[str] = "condensing"
    ratios: tuple[int, ...] = ()
    factor: float = 1.0
    rows: int = 64
    min_rows: int = 2

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        if not isinstance(opened.config, BeaconExperiment):
            raise NotApplicable(f"it is for runs of kind {BeaconExperiment.kind!r}")
        task, beacon = task_of(opened), opened.config.model.beacon
        length = round(self.factor * opened.config.task.seq_len)
        if length <= beacon.window:
            raise NotApplicable(f"rows of {length} tokens are no longer than a window of {beacon.window}")
        found = rows_available(task, length)
        if found < self.min_rows:
            raise NotApplicable(f"{found} validation texts of {length} targets, {self.min_rows} needed")
        rows = long_rows(task, length, self.rows)
        later = np.arange(length) // beacon.window > 0
        say(f"{len(rows['tokens'])} rows of {length} targets")
        without = _at(opened, 0)
        sums = {"full": _measure(without, task, rows, later)}
        bytes_of = {"full": _kv_bytes(without, length)}
        apart = _measure(without, task, _windows_apart(rows, beacon.window), later)
        for ratio in sorted(self.ratios or beacon.ratios):
            say(f"ratio {ratio}")
            condensed = _at(opened, ratio)
            sums[f"ratio_{ratio}"] = _measure(condensed, task, rows, later)
            bytes_of[f"ratio_{ratio}"] = _kv_bytes(condensed, length)
        sums["truncated"], bytes_of["truncated"] = apart, _kv_bytes(without, beacon.window)
        table = {name: means(pair) for name, pair in sums.items()}
        metric = next(metric for metric in UNITS if metric in table["full"])
        best, worst = table["full"][metric], table["truncated"][metric]
        numbers: dict[str, Any] = {
            "rows": len(rows["tokens"]),
            "length": length,
            "window": beacon.window,
            "kv_bytes": bytes_of,
            "lost": {name: (values[metric] - best) / (worst - best) for name, values in table.items()},
        }
        for each in table["full"]:
            numbers[each] = {name: values[each] for name, values in table.items()}
        return ProbeResult(numbers, _curves(numbers, metric))

    def plot(self, result: ProbeResult) -> Figure:
        return plot_curves(result.curves, "Condensing ratio")


def _at(opened: OpenRun, ratio: int) -> OpenRun:
    """The run with windows condensed ``ratio`` times."""
    beacon = dataclasses.replace(opened.config.model.beacon, eval_ratios=(ratio,), eval_mix="sequence")
    config = dataclasses.replace(opened.config, model=dataclasses.replace(opened.config.model, beacon=beacon))
    config.model.validate()
    return dataclasses.replace(opened, config=config, model=model_of(config))


def _kv_bytes(opened: OpenRun, length: int) -> int:
    return opened.model.bind(opened.model.shapes).kv_bytes(length)[0]


def _windows_apart(rows: Batch, window: int) -> Batch:
    """``rows`` with every window a document of its own."""
    index = np.arange(rows["tokens"].shape[1])
    same = np.ones_like(rows["segment_ids"])
    return {**rows, "segment_ids": same * (1 + index // window), "positions": same * (index % window)}


def _measure(opened: OpenRun, task: LMTask, rows: Batch, counted: Bool[np.ndarray, " L"]) -> dict[str, Pair]:
    """Sums and weights of every metric over the ``counted`` targets."""
    scores = score(opened, task, rows, rows["tokens"].shape[1])
    return jax.tree.map(lambda a: a[:, counted].sum(dtype=np.float64), scores)


def _curves(numbers: dict[str, Any], metric: str) -> dict[str, Curve]:
    ratios = {name: int(name.removeprefix("ratio_")) for name in numbers[metric] if "ratio" in name}
    x, label = list(ratios.values()), UNITS[metric]

    def level(name: str) -> Curve:
        return Curve(x, [numbers[metric][name]] * len(x), "raw tokens a beacon", label)

    return {
        "condensed": Curve(x, [numbers[metric][name] for name in ratios], "raw tokens a beacon", label),
        "full attention": level("full"),
        "the window alone": level("truncated"),
    }

"""How much attention a hybrid needs: its share of the sequence mixers from 0 to 1, at equal parameters.

Factors: "task" ("lm" or one of recall) and "share". Settings: "metrics": {task: metric of result.json}; of
"lm" smaller is better, of the others larger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report import words
from eval.report.document import Chart, Section
from eval.report.groups import curve_series
from eval.studies.reading import SEEDS, Value, curves, difference, levels, over_seeds, result, signed, where
from eval.studies.types import Analysis, Finding, Record, judge

METRICS = {"lm": "validation/bits_per_byte"}
ACCURACY, ENOUGH = "validation/accuracy", -0.05


def analyse(records: Sequence[Record], settings: Mapping[str, Any]) -> Analysis:
    metrics = METRICS | dict(settings.get("metrics", {}))
    findings, charts = list[Finding](), list[Chart]()
    for task in levels(records, "task"):
        name = metrics.get(task, ACCURACY)
        mine, metric = where(records, task=task), result(name)
        shares = sorted(levels(mine, "share"))
        if len(shares) > 1:
            findings += _text(mine, shares, metric) if task == "lm" else _recall(mine, task, shares, metric)
        found = curves(mine, lambda record: float(record.factor("share")), metric)
        series = curve_series(task, found, colour=len(charts), marks=True)
        label = words.METRICS.get(name.rpartition("/")[2], name.rpartition("/")[2].replace("_", " "))
        charts.append(Chart(f"{task}: {label}", "share of attention", label, series, SEEDS))
    return Analysis(findings, [Section("By the share of attention", charts)] if charts else [])


def _text(records: Sequence[Record], shares: Sequence[float], metric: Value) -> list[Finding]:
    """The best mixture against the better of the pure ones."""
    means = {s: found.mean for s in shares if (found := over_seeds(where(records, share=s), metric))}
    mixed = [share for share in means if 0 < share < 1]
    pure = [share for share in means if share in (0, 1)]
    apart, interval, best = math.nan, (math.nan, math.nan), math.nan
    if mixed and len(pure) == 2:
        best, rival = (min(side, key=lambda share: means[share]) for side in (mixed, pure))
        apart, interval = difference(where(records, share=rival), where(records, share=best), metric)
    return [
        Finding(
            "A hybrid models text better than either of its parts alone (arXiv:2406.07887: 4 layers of "
            "attention, 24 of Mamba-2)",
            "loss of the better pure model less that of the best mixture above 0",
            f"{signed(apart, interval)}; the best share is {best:g}",
            judge(interval),
            {"share": best, "difference": apart, "interval": interval},
        )
    ]


def _recall(records: Sequence[Record], task: str, shares: Sequence[float], metric: Value) -> list[Finding]:
    """The smallest share of attention against attention alone."""
    least = min((share for share in shares if share > 0), default=1.0)
    few, all_of_it = (where(records, share=share) for share in (least, 1.0))
    apart, interval = difference(few, all_of_it, metric) if least < 1 else (math.nan, (math.nan, math.nan))
    return [
        Finding(
            f"A few attention layers are enough to recall (arXiv:2406.07887), here on {task}",
            f"accuracy with the smallest share of attention less that of attention alone above {ENOUGH:g}",
            f"{signed(apart, interval)}; share {least:g}",
            judge(interval, ENOUGH),
            {"task": task, "share": least, "difference": apart, "interval": interval},
        )
    ]

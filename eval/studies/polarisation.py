"""Polarised channels of Mamba (arXiv:2501.00658): one that never forgets, one that remembers nothing.

Factors: "channels" ("default", "one", "zero", "both") and "depth", the number of layers. Settings: "metric"
of result.json, or "by_pairs": {number of pairs: metric}; the findings are of the last of them, the hardest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval import fits
from eval.report import words
from eval.report.document import HeatMap, Section, Table
from eval.studies.reading import Value, difference, levels, over_seeds, result, signed, values, where
from eval.studies.types import Analysis, Finding, Record, judge

METRIC = "validation/accuracy"
CHANNELS = {"default": "default", "zero": "A = 0", "one": "A = 1", "both": "both"}
# Accuracy in percent by (channels, depth), with 64, 128 and 256 pairs in 1024 tokens.
PUBLISHED = {
    ("default", 2): (98.38, 81.81, 36.00),
    ("default", 4): (99.23, 82.08, 33.52),
    ("one", 2): (99.81, 94.70, 56.39),
    ("zero", 2): (98.41, 81.35, 36.55),
    ("zero", 4): (99.74, 92.20, 52.21),
    ("both", 2): (99.23, 95.54, 54.74),
    ("both", 4): (99.94, 98.80, 81.56),
}
PAPER = "arXiv:2501.00658"


def analyse(records: Sequence[Record], settings: Mapping[str, Any]) -> Analysis:
    by_pairs = dict(settings.get("by_pairs") or {"all": settings.get("metric", METRIC)})
    hardest, name = list(by_pairs.items())[-1]
    metric, depths = result(name), sorted(levels(records, "depth"))
    if not depths:
        return Analysis([], [])
    at = f"with {hardest} pairs" if hardest != "all" else "over all sizes"
    findings = [
        _better(records, "both", depths[-1], metric, at),
        _better(records, "one", depths[0], metric, at),
        _depth(records, depths, metric, at),
    ]
    maps = [_map(records, depths, pairs, result(m)) for pairs, m in by_pairs.items()]
    return Analysis(findings, [Section("Accuracy", maps), Section("Published", [_published()])])


def _better(records: Sequence[Record], channels: str, depth: int, metric: Value, at: str) -> Finding:
    ours, default = (where(records, channels=c, depth=depth) for c in (channels, "default"))
    apart, interval = difference(ours, default, metric)
    theirs = [PUBLISHED.get((c, depth), (math.nan,))[-1] for c in (channels, "default")]
    beside = "" if math.isnan(sum(theirs)) else f" ({theirs[0]} % against {theirs[1]} % with 256 pairs)"
    return Finding(
        f"Channels {CHANNELS[channels]} help Mamba of {depth} layers recall{beside} ({PAPER})",
        f"accuracy {at} less that of the default above 0",
        signed(apart, interval),
        judge(interval),
        {"channels": channels, "depth": depth, "difference": apart, "interval": interval},
    )


def _depth(records: Sequence[Record], depths: Sequence[int], metric: Value, at: str) -> Finding:
    """Paired by seed: what depth adds with polarised channels, less what it adds without."""
    gains = {}
    for channels in ("default", "both"):
        found = {
            depth: {
                r.seed: v for r in where(records, channels=channels, depth=depth) for v in values([r], metric)
            }
            for depth in (depths[0], depths[-1])
        }
        shallow, deep = found[depths[0]], found[depths[-1]]
        gains[channels] = {seed: deep[seed] - shallow[seed] for seed in deep if seed in shallow}
    apart = [
        gains["both"][seed] - gains["default"][seed] for seed in gains["both"] if seed in gains["default"]
    ]
    mean = sum(apart) / len(apart) if apart and len(depths) > 1 else math.nan
    interval = fits.mean_interval(apart) if len(apart) > 1 else (mean, mean)
    return Finding(
        f"Polarised channels make depth useful: without them a deeper Mamba recalls no better ({PAPER})",
        f"what depth adds to the accuracy {at} with both channels, less what it adds to the default, above 0",
        signed(mean, interval),
        judge(interval),
        {"difference": mean, "interval": interval},
    )


def _map(records: Sequence[Record], depths: Sequence[int], pairs: Any, metric: Value) -> HeatMap:
    rows = []
    for channels in levels(records, "channels"):
        found = [over_seeds(where(records, channels=channels, depth=depth), metric) for depth in depths]
        rows.append([math.nan if f is None else f.mean for f in found])
    title = "Accuracy" if pairs == "all" else f"Accuracy with {pairs} pairs"
    names = [CHANNELS.get(c, c) for c in levels(records, "channels")]
    return HeatMap(
        title, "layers", "channels", [str(d) for d in depths], names, rows, caption="Mean over seeds."
    )


def _published() -> Table:
    rows = [
        [f"{CHANNELS[channels]}, {words.plural(depth, 'layer')}", *(f"{value:.2f}" for value in row)]
        for (channels, depth), row in PUBLISHED.items()
    ]
    caption = f"{PAPER}: percent, 1024 tokens, width 128."
    return Table(["channels", "64 pairs", "128 pairs", "256 pairs"], rows, caption)

"""Analyses of studies by name: pure functions from the records of runs to findings and figures."""

from __future__ import annotations

from eval.studies import hybrid_ratio, length, polarisation, recall, state_capacity, trials
from eval.studies.types import Analyse

ANALYSES: dict[str, Analyse] = {
    "recall": recall.analyse,
    "state_capacity": state_capacity.analyse,
    "length": length.analyse,
    "polarisation": polarisation.analyse,
    "hybrid_ratio": hybrid_ratio.analyse,
    "trials": trials.analyse,
}

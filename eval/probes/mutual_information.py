"""How much the first half of a text tells a model of the second, and how that grows with length."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from eval.opened import OpenRun
from eval.probes.inside import reach, standard_error
from eval.probes.plot import plot_curves
from eval.probes.scoring import long_rows, rows_available, score, task_of
from eval.probes.types import Curve, NotApplicable, ProbeResult, Say
from tasks.types import Batch

RESAMPLES = 500


@dataclasses.dataclass(frozen=True)
class MutualInformation:
    """A proxy for the bipartite mutual information of L2M (Chen et al. 2025, arXiv:2503.04725).

    The information between the halves of a text of L tokens is H(second half) - H(second half | first half).
    Here the model's loss stands for the entropies:

        gain(L) = sum over the second half of -log2 p(token | second half so far) + log2 p(token | all so far)

    in bits, on validation rows that end at the same places for every L. The law gain = c L^beta is fitted by
    least squares in logarithms up to the training length (``beta``), with a bootstrap interval over rows. In
    text 0 < beta < 1; a model that keeps up needs a state that grows at least like L^beta. It is a bound of
    what this model gets out of its context, and no estimate of the text's own information: compare models of
    several state sizes. Beyond the training length a gain that falls shows a context that does harm.

    Attributes:
        shortest: the least L.
        factor: the largest L in training lengths; halved until there are ``min_rows`` rows.
    """

    name: ClassVar[str] = "mutual_information"
    shortest: int = 16
    factor: float = 4.0
    rows: int = 32
    min_rows: int = 8

    def __post_init__(self) -> None:
        if self.shortest < 2 or self.factor <= 0 or not 1 <= self.min_rows <= self.rows:
            raise ValueError(f"{self.name}: shortest >= 2, factor > 0 and 1 <= min_rows <= rows, got {self}")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        task = task_of(opened)
        trained = task.config.seq_len
        lengths = [trained]
        while lengths[0] % 2 == 0 and lengths[0] // 2 >= self.shortest:
            lengths.insert(0, lengths[0] // 2)
        while (longer := 2 * lengths[-1]) <= reach(opened, round(self.factor * trained)):
            lengths.append(longer)
        while lengths and rows_available(task, lengths[-1]) < self.min_rows:
            lengths.pop()
        if sum(n <= trained for n in lengths) < 3:
            raise NotApplicable(
                f"a law takes three lengths of halves, by doubling to the training length {trained} from "
                f"shortest={self.shortest} on, with {self.min_rows} validation texts each; found {lengths}"
            )
        texts = long_rows(task, lengths[-1], self.rows)
        gains = []
        before = self._bits(opened, texts, lengths[0] // 2, lengths[-1])
        for length in lengths:
            say(f"{len(texts['tokens'])} rows of {length} targets")
            with_first = self._bits(opened, texts, length, lengths[-1])
            gains.append((before - with_first[:, -(length // 2) :]).sum(axis=1))
            before = with_first
        table = np.stack(gains, axis=1)  # [rows, lengths]
        fitted = np.array(lengths) <= trained
        numbers: dict[str, Any] = {
            "training_length": trained,
            "rows": len(table),
            **_fit(np.array(lengths)[fitted], table[:, fitted]),
            "bits": dict(zip(map(str, lengths), table.mean(axis=0))),
            "bits_standard_error": dict(zip(map(str, lengths), standard_error(table))),
        }
        return ProbeResult(numbers, _curves(numbers, np.array(lengths), table))

    def plot(self, result: ProbeResult) -> Figure:
        marks = {"training length": result.numbers["training_length"]}
        label = result.curves["measured"].ylabel
        return plot_curves(result.curves, "Use of the first half", marks=marks, logarithmic=[label])

    def _bits(self, opened: OpenRun, texts: Batch, length: int, room: int) -> Float[np.ndarray, "n L"]:
        """Bits of the last ``length`` targets of each text, read from there on alone."""
        part = {name: array[:, -length:] for name, array in texts.items()}
        part["positions"] = texts["positions"][:, :length]
        nats, _ = score(opened, task_of(opened), part, room)["loss"]
        return np.asarray(nats, np.float64) / np.log(2)


def _fit(lengths: np.ndarray, gains: Float[np.ndarray, "n l"]) -> dict[str, float]:
    """The exponent of mean gain = c L^beta with 95 % of the bootstrap over rows, and R^2 in logarithms."""
    beta, r2 = _slope(lengths, gains.mean(axis=0))
    drawn = np.random.default_rng(0).integers(len(gains), size=(RESAMPLES, len(gains)))
    betas = [_slope(lengths, gains[rows].mean(axis=0))[0] for rows in drawn]
    low, high = np.nanquantile(betas, [0.025, 0.975]) if np.isfinite(betas).any() else (np.nan, np.nan)
    return {"beta": beta, "beta_low": low, "beta_high": high, "r2": r2}


def _slope(lengths: np.ndarray, gain: Float[np.ndarray, " l"]) -> tuple[float, float]:
    """Slope and R^2 in logarithms, over the lengths where anything is gained; NaN for fewer than two."""
    kept = gain > 0
    if kept.sum() < 2:
        return np.nan, np.nan
    x, y = np.log(lengths[kept]), np.log(gain[kept])
    beta, offset = np.polyfit(x, y, 1)
    left, all_ = y - beta * x - offset, y - y.mean()
    return float(beta), float(1 - left @ left / (all_ @ all_))


def _curves(
    numbers: dict[str, Any], lengths: np.ndarray, table: Float[np.ndarray, "n l"]
) -> dict[str, Curve]:
    mean, error = table.mean(axis=0), standard_error(table)
    axes = ("length of both halves", "bits gained by the first half")
    curves = {"measured": Curve(lengths, mean, *axes, error)}
    fitted = (lengths <= numbers["training_length"]) & (mean > 0)
    if fitted.sum() >= 2:
        offset = np.log(mean[fitted]).mean() - numbers["beta"] * np.log(lengths[fitted]).mean()
        law = np.exp(offset) * lengths ** numbers["beta"]
        curves[f"L^{numbers['beta']:.2f}, fitted up to the training length"] = Curve(lengths, law, *axes)
    return curves

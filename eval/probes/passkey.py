"""Passkey retrieval by length and depth: a number hidden in noise, asked for at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from eval.opened import OpenRun
from eval.probes.answers import lengths_of, noise_of, read, tokenizer_of
from eval.probes.types import Curve, Grid, NotApplicable, ProbeResult, Say
from tasks.haystack.config import NOISES
from tasks.haystack.passkey import GENERATORS, chance
from tasks.haystack.types import Request, Sample, TooShort

MEASURES = {"exact_match": "keys exact", "per_digit": "digits right", "key_nats": "nats of a key"}
LAST = (0.25, 0.5)  # training lengths; and all lengths that were measured
RECALLED = 0.95
LEGIBLE = 60  # cells of a heat map with room for numbers


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Keys that training never had, at every length and depth.

    * ``exact_match``: greedy decoding gives the key (and ends it, in styles that ask for the first number).
    * ``per_digit``: digits right, the ones before them given; smoother for small models.
    * ``key_nats``: negative log-probability of the key.
    * ``exact_within``: exact match where the key stands in the last r tokens, of prompts of all lengths.
    * ``recall_length``: the longest length with more than 95 % exact (T_recall, arXiv:2410.07145), or 0.

    Every prompt is a heat-map cell's: ``grids`` are lengths by depths. A run trained on text alone is asked
    zero-shot; for one that learns the task see `tasks.haystack.config`.

    Attributes:
        styles: published styles, see `tasks.haystack.passkey`.
        factors: prompt lengths, in training lengths.
        depths, samples: depths (i + 1/2) / n, and prompts of each length and depth.
        noise: "own" as published, "text" of the run's validation side, "sentences" made by rule.
        rows: prompts read at a time.
        seed: of keys and noise.
    """

    name: ClassVar[str] = "passkey"
    styles: tuple[str, ...] = ("stuffed_mamba", "landmark")
    factors: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    depths: int = 5
    samples: int = 4
    noise: str = "own"
    rows: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [style for style in self.styles if style not in GENERATORS]
        checks = {
            "styles": (self.styles and not unknown, f"some of {', '.join(GENERATORS)}"),
            "factors": (self.factors and min(self.factors) > 0, "positive, and at least one"),
            "depths": (self.depths >= 1, "at least 1"),
            "samples": (self.samples >= 1, "at least 1"),
            "noise": (self.noise in NOISES, f"one of {', '.join(NOISES)}"),
            "rows": (self.rows >= 1, "at least 1"),
        }
        for field, (fits, wanted) in checks.items():
            if not fits:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)!r} should be {wanted}")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        tokenizer = tokenizer_of(opened)
        lengths, left_out = lengths_of(opened, self.factors)
        made: dict[tuple[str, str], list[Sample]] = {}  # by style and length; depth varies slowest in each
        for style in self.styles:
            for name, length in lengths.items():
                try:
                    made[style, name] = self._samples(opened, style, length)
                except TooShort as short:
                    left_out[f"{style} {name}"] = str(short)
        for name, reason in left_out.items():
            say(f"{name} left out: {reason}")
        if not made:
            raise NotApplicable(f"no prompt fits: {'; '.join(map(str, left_out.values()))}")
        samples = [sample for some in made.values() for sample in some]
        readings = read(opened, samples, say, rows=self.rows)
        right, of = np.array([r.digits(s, tokenizer) for r, s in zip(readings, samples)], float).T
        found = {
            "exact_match": np.array([r.is_exact(s, tokenizer) for r, s in zip(readings, samples)], float),
            "per_digit": right / of,
            "key_nats": np.array([r.nats.sum() for r in readings], float),
        }
        shape = (len(made), self.depths, self.samples)
        cells = {name: dict(zip(made, values.reshape(shape))) for name, values in found.items()}
        distance = dict(zip(made, np.array([len(s.prompt) - s.fact for s in samples]).reshape(shape)))
        numbers = {
            "training_length": opened.config.task.seq_len,
            "lengths": lengths,
            "left_out": left_out,
            "prompts": len(samples),
            **self._numbers(cells, distance, lengths, opened.config.task.seq_len),
        }
        return ProbeResult(numbers, self._curves(numbers), grids=_grids(numbers))

    def plot(self, result: ProbeResult) -> Figure:
        """Heat maps: a row for each style."""
        rows = len(result.grids) // len(MEASURES)
        size = (4.2 * len(MEASURES), 0.9 + 2.6 * rows)
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        panels = figure.subplots(rows, len(MEASURES), squeeze=False)
        for axes, (title, grid) in zip(panels.flat, result.grids.items()):
            values = np.asarray(grid.values)
            colours = "viridis_r" if MEASURES["key_nats"] in title else "viridis"
            image = axes.imshow(values, vmin=grid.low, vmax=grid.high, cmap=colours, aspect="auto")
            if values.size <= LEGIBLE:
                _write(axes, values, image)
            else:
                figure.colorbar(image, ax=axes)
            axes.set_xticks(range(len(grid.x)), grid.x)
            axes.set_yticks(range(len(grid.y)), grid.y)
            axes.set(xlabel=grid.xlabel, ylabel=grid.ylabel, title=title)
        figure.suptitle(f"Passkey (trained at {result.numbers['training_length']} tokens)", fontsize=10)
        return figure

    @property
    def _depths(self) -> list[float]:
        return [(i + 0.5) / self.depths for i in range(self.depths)]

    def _samples(self, opened: OpenRun, style: str, length: int) -> list[Sample]:
        tokenizer, noise = tokenizer_of(opened), noise_of(opened, self.noise)

        def make(i: int, depth: float, j: int) -> Sample:
            rng = np.random.default_rng((self.seed, length, i, j))
            return GENERATORS[style](Request(rng, tokenizer, length, noise=noise, depth=depth))

        return [make(i, depth, j) for i, depth in enumerate(self._depths) for j in range(self.samples)]

    def _numbers(
        self,
        cells: Mapping[str, Mapping[tuple[str, str], np.ndarray]],
        distance: Mapping[tuple[str, str], np.ndarray],
        lengths: Mapping[str, int],
        trained: int,
    ) -> dict[str, Any]:
        """By style: every measure by length, exact match within the last tokens, chance, and the grids."""
        numbers: dict[str, Any] = {}
        grids: dict[str, Any] = {}
        for style in dict.fromkeys(style for style, _ in distance):
            names = [name for of, name in distance if of == style]
            grids[style] = {"lengths": names, "depths": self._depths}
            for measure, values in cells.items():
                numbers[f"{style}_{measure}"] = {name: values[style, name].mean() for name in names}
                grids[style][measure] = [values[style, name].mean(axis=1) for name in names]
            away = np.concatenate([distance[style, name].ravel() for name in names])
            exact = np.concatenate([cells["exact_match"][style, name].ravel() for name in names])
            reach = sorted({round(share * trained) for share in LAST} | {lengths[name] for name in names})
            numbers[f"{style}_exact_within"] = {
                str(r): exact[away <= r].mean() for r in reach if (away <= r).any()
            }
            found = [lengths[n] for n, share in numbers[f"{style}_exact_match"].items() if share > RECALLED]
            numbers[f"{style}_recall_length"] = max(found, default=0)
            numbers[f"{style}_chance"] = chance(style)
        return {**numbers, "grids": grids}

    def _curves(self, numbers: Mapping[str, Any]) -> dict[str, Curve]:
        curves = {}
        for style in numbers["grids"]:
            for measure, label in MEASURES.items():
                values = numbers[f"{style}_{measure}"]
                x = [numbers["lengths"][name] for name in values]
                curves[f"{style}: {label}"] = Curve(
                    x, list(values.values()), "prompt length", "nats" if measure == "key_nats" else "share"
                )
        return curves


def _grids(numbers: Mapping[str, Any]) -> dict[str, Grid]:
    """Heat maps of length and depth: for each style all measures."""
    grids = {}
    for style, found in numbers["grids"].items():
        x = [str(numbers["lengths"][name]) for name in found["lengths"]]
        y = [f"{100 * depth:.0f} %" for depth in found["depths"]]
        for measure, label in MEASURES.items():
            values = np.array(found[measure], float).T
            worst = max(chance(style)["nats"], values.max()) if measure == "key_nats" else 1.0
            grids[f"{style}: {label}"] = Grid(x, y, values, "prompt length (tokens)", "depth", high=worst)
    return grids


def _write(axes: Axes, values: np.ndarray, image: AxesImage) -> None:
    """Numbers into the cells of a heat map, in white on dark colours and in black on light ones."""
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.to_rgba(value)
        ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
        axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=8)

"""Odds of objectives that follow rewards (Birdie, arXiv:2411.01030, section 3): what has just lowered losses?

Held-out losses of every objective are compared from one evaluation to the next. A model of the reward as a
function of the odds then ranks random odds, and the mean of the best is used until the next evaluation. The
authors' model is a gated state-space network of four layers; here it is ridge regression, which has a closed
form. All of it follows from the recorded evaluations, so that a resumed run has the same odds.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import bisect
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from tasks.birdie import kind

DELAY = 8
"""Steps from an evaluation to the first batch with its odds: batches are made a few steps ahead."""


@dataclasses.dataclass
class RewardConfig:
    """How odds follow rewards.

    Attributes:
        on: whether they do.
        uniform_steps: evaluations before this step change nothing.
        candidates, best: random odds that are ranked, and how many of the best are averaged.
        ridge: weight of the squared coefficients, in evaluations.
        seed: of the candidates.
    """

    on: bool = False
    uniform_steps: int = 250
    candidates: int = 2048
    best: int = 8
    ridge: float = 1.0
    seed: int = 0

    def validate(self) -> None:
        """Raises ValueError naming the field that cannot work."""
        if not 1 <= self.best <= self.candidates:
            raise ValueError(
                f"task.mixture.reward.best={self.best} must lie in 1..candidates={self.candidates}"
            )
        if self.ridge <= 0:
            raise ValueError(f"task.mixture.reward.ridge={self.ridge} must be above 0")


def reward(old: Float[np.ndarray, "*b"], new: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """``clip(100 e tanh(e s d^3), -1, 1)`` with d = (old - new) / old and s = sqrt(old new): above 0 where
    the loss has fallen; 0 for what is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        fallen = (old - new) / (old + 1e-8)
        found = np.clip(100 * np.e * np.tanh(np.e * np.sqrt(old * new) * fallen**3), -1, 1)
    return np.where(np.isfinite(found), found, 0.0)


def total_reward(rewards: Float[np.ndarray, "*b n"], kinds: Sequence[str]) -> Float[np.ndarray, "*b"]:
    """The mean over the objectives of each kind, summed over kinds: settings of one kind share its weight."""
    names = np.array(kinds)
    return np.asarray(sum(rewards[..., names == name].mean(-1) for name in dict.fromkeys(kinds)))


class Rewarded:
    """Odds by step; knows the evaluations it has been shown."""

    def __init__(self, config: RewardConfig, objectives: Sequence[str]):
        self.config, self.objectives = config, tuple(objectives)
        self._steps: list[int] = []
        self._odds: list[Float[np.ndarray, " n"]] = []
        self._uniform = np.full(len(objectives), 1 / len(objectives))

    def odds(self, step: int) -> Float[np.ndarray, " n"]:
        """Of each objective at a training step: by the newest evaluation at least :data:`DELAY` before."""
        number = bisect.bisect_right(self._steps, step - DELAY) - 1
        return self._odds[number] if number >= 0 else self._uniform

    def observe(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Take in all evaluations so far, oldest first: records with "step" and "OBJECTIVE/loss"."""
        names = [f"{name}/loss" for name in self.objectives]
        records = [r for r in evaluations if all(name in r for name in names)]
        steps = [int(r["step"]) for r in records]
        losses = np.array([[float(r[name]) for name in names] for r in records]).reshape(-1, len(names))
        rewards, used = reward(losses[:-1], losses[1:]), list[np.ndarray]()
        # Built anew, and only then shown: batches are made by other threads.
        made = Rewarded(self.config, self.objectives)
        for number, step in enumerate(steps):
            if number:
                used.append(made.odds(step - 1))
            chosen = self._uniform
            if number and step >= self.config.uniform_steps:
                chosen = self._best(np.array(used), rewards[:number], number)
            made._steps.append(step)
            made._odds.append(chosen)
        self._odds, self._steps = made._odds, made._steps

    def read(self, metrics: epath.PathLike) -> None:
        """Take in what a run has recorded, if it has: a resumed run knows what the first knew."""
        path = epath.Path(metrics)
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            self.observe([json.loads(line) for line in lines])

    def _best(
        self, odds: Float[np.ndarray, "k n"], rewards: Float[np.ndarray, "k n"], number: int
    ) -> Float[np.ndarray, " n"]:
        """The mean of the most promising candidates after ``number`` intervals."""
        rng = np.random.default_rng((self.config.seed, number))
        candidates = rng.dirichlet(np.ones(len(self.objectives)), self.config.candidates)
        predicted = ridge_regression(odds, rewards, self.config.ridge)(candidates)
        score = total_reward(predicted, [kind(name) for name in self.objectives])
        return candidates[np.argsort(-score, kind="stable")[: self.config.best]].mean(axis=0)


def ridge_regression(
    x: Float[np.ndarray, "k n"], y: Float[np.ndarray, "k m"], weight: float
) -> Callable[[np.ndarray], np.ndarray]:
    """The affine map that fits y on x with squared coefficients penalised, as a function of rows of x."""
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    centred = x - x_mean
    gram = centred.T @ centred + weight * np.eye(x.shape[1]) / x.shape[1]
    slopes = np.linalg.solve(gram, centred.T @ (y - y_mean))
    return lambda rows: y_mean + (rows - x_mean) @ slopes

"""Training on a mixture of objectives, or on input of which a part is masked: rows of text, transformed.

* Objectives: each row becomes one of `tasks.birdie.OBJECTIVES`, drawn with fixed odds, or with odds that
  follow rewards (`tasks.reward`).
* Masks (MEAP, Zhuang et al. 2025, arXiv:2502.07490): a share of the input tokens is hidden, and every next
  token is predicted all the same.

Held-out text stays as it is.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from tasks.birdie import COUNT, OBJECTIVES, Ids, row, shortest_row
from tasks.packing import row_range
from tasks.reward import RewardConfig, Rewarded


@dataclasses.dataclass
class MixtureConfig:
    """What becomes of the rows of training text.

    Attributes:
        objectives: names in `tasks.birdie.OBJECTIVES`; () leaves rows as they are.
        odds: of each objective, None for equal ones.
        reward: odds that follow rewards instead, learned while training.
        eval_batches: of validation text under each objective, each a held-out set "OBJECTIVE"; 0 for none.
        mask_share: of the input tokens that are hidden (0.15 in MEAP's pretraining).
        seed: of what is drawn.
    """

    objectives: tuple[str, ...] = ()
    odds: tuple[float, ...] | None = None
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    eval_batches: int = 0
    mask_share: float = 0.0
    seed: int = 0

    @property
    def added_ids(self) -> int:
        """Ids after those of the text."""
        return COUNT if self.objectives or self.mask_share else 0

    def validate(self, seq_len: int) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise ValueError(f"task.mixture.objectives has {name!r}; there are {', '.join(OBJECTIVES)}")
            if seq_len < shortest_row(name):
                raise ValueError(
                    f"task.mixture.objectives has {name!r}, which needs task.seq_len={seq_len} to be at "
                    f"least {shortest_row(name)}"
                )
        if self.odds is not None and (
            len(self.odds) != len(self.objectives) or min(self.odds) < 0 or not sum(self.odds)
        ):
            raise ValueError(
                f"task.mixture.odds={self.odds} should be {len(self.objectives)} numbers, one an objective, "
                "not negative and not all 0"
            )
        if not 0 <= self.mask_share < 1:
            raise ValueError(f"task.mixture.mask_share={self.mask_share} must be at least 0 and below 1")
        if self.reward.on and (not self.objectives or not self.eval_batches):
            raise ValueError(
                "task.mixture.reward.on=True learns from task.mixture.objectives by their held-out losses: "
                f"set them and task.mixture.eval_batches (found {self.eval_batches})"
            )
        self.reward.validate()


class Mixture:
    """Transforms batches of a language-modelling task; a pure function of the step, the row and, with
    rewards, of the evaluations before.

    Args:
        text_ids: number of ids of the text; the special ones follow.
        seq_len, shortest: tokens of the longest training rows, and of the shortest that is transformed.
    """

    def __init__(self, config: MixtureConfig, text_ids: int, seq_len: int, shortest: int):
        config.validate(shortest)
        self.config, self.ids, self.seq_len = config, Ids(text_ids), seq_len
        self.rewarded = Rewarded(config.reward, config.objectives) if config.reward.on else None

    def odds(self, step: int) -> Float[np.ndarray, " n"]:
        """Of each objective at a training step."""
        if self.rewarded is not None:
            return self.rewarded.odds(step)
        odds = np.asarray(self.config.odds or [1.0] * len(self.config.objectives))
        return odds / odds.sum()

    def observe(self, evaluations: Sequence[Mapping[str, Any]]) -> None:
        """Take in the records of all evaluations so far, oldest first."""
        if self.rewarded is not None:
            self.rewarded.observe(evaluations)

    def into(self, batches: grain.MapDataset, rows: slice | None, batch_size: int) -> grain.MapDataset:
        """Training ``batches`` (rows ``rows`` of them) with their rows transformed."""
        start, _ = row_range(rows, batch_size)
        return batches.map_with_index(functools.partial(self._train, start))

    def eval_sets(
        self, batches: grain.MapDataset, rows: slice | None, batch_size: int
    ) -> dict[str, grain.MapDataset]:
        """The first ``eval_batches`` of validation under each objective, the same at every evaluation."""
        start, _ = row_range(rows, batch_size)
        count = min(self.config.eval_batches, len(batches))
        return {
            name: batches[:count].map_with_index(functools.partial(self._held_out, start, number))
            for number, name in enumerate(self.config.objectives if count else ())
        }

    def _train(self, start: int, step: int, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names, first = self.config.objectives, start * (self.seq_len // batch["tokens"].shape[1])
        rngs = [np.random.default_rng((self.config.seed, step, first + r)) for r in _rows(batch)]
        made = dict(batch)
        if names:
            chosen = [names[rng.choice(len(names), p=self.odds(step))] for rng in rngs]
            made = self._transformed(batch, chosen, rngs)
        if self.config.mask_share:
            hidden = np.stack([rng.random(batch["tokens"].shape[1]) for rng in rngs]) < self.config.mask_share
            hidden &= made["segment_ids"] > 0
            made["tokens"] = np.where(hidden, self.ids.hidden, made["tokens"]).astype(np.int32)
        return made

    def _held_out(
        self, start: int, number: int, step: int, batch: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        rngs = [np.random.default_rng((number, step, start + r)) for r in _rows(batch)]
        made = self._transformed(batch, [self.config.objectives[number]] * len(rngs), rngs)
        empty = batch["weights"].max(axis=1) == 0  # rows that fill a last batch
        made["weights"] = np.where(empty[:, None], 0, made["weights"]).astype(np.float32)
        return made

    def _transformed(
        self, batch: Mapping[str, np.ndarray], names: Sequence[str], rngs: Sequence[np.random.Generator]
    ) -> dict[str, np.ndarray]:
        plain = {**batch, "prefix": np.zeros(batch["tokens"].shape, bool)}
        made = []
        for number, (name, rng) in enumerate(zip(names, rngs)):
            objective = OBJECTIVES[name]
            old = {field: array[number] for field, array in plain.items()}
            made.append(old if objective is None else old | row(objective, rng, old["tokens"], self.ids))
        return {field: np.stack([fields[field] for fields in made]) for field in plain}


def _rows(batch: Mapping[str, np.ndarray]) -> range:
    return range(len(batch["tokens"]))

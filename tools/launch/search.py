"""A search over the space of a sweep file with Optuna: a study whose next arm follows from the last results.

The trials are kept in ``root/optuna.journal``, so that a search goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.base import ConfigError
from configs.study import Study
from configs.trials import Overrides, Space
from tools.launch.checks import check
from tools.launch.executor import needed
from tools.launch.plan import Outcome, run_name

SAMPLES = 20  # drawn at random to see whether their configs can be made
DRAWN = "overrides"  # where a trial keeps what was drawn for it


class Search:
    """Asks Optuna for trials and tells it what they gave.

    Args:
        total: trials in all, those of earlier starts included.
        ahead: trials that may be under way at once.

    Raises:
        ConfigError: Optuna is not there, or the space draws what no config takes.
    """

    def __init__(self, space: Space, root: Path, total: int, ahead: int):
        self._optuna = needed("optuna", "search")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._space, self._total, self._ahead = space, total, ahead
        self._check()
        storage = self._optuna.storages
        root.mkdir(parents=True, exist_ok=True)
        backend = storage.journal.JournalFileBackend(str(root / "optuna.journal"))
        self._study = self._optuna.create_study(
            storage=storage.JournalStorage(backend),
            study_name=space.name,
            direction={"min": "minimize", "max": "maximize"}[space.best],
            load_if_exists=True,
        )
        # Another seed at every start: the same would draw the first trials once more.
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=len(self._study.trials), constant_liar=True
        )

    def study(self, outcomes: Mapping[str, Outcome]) -> Study:
        """All arms so far, a new one for each that has ended, until there are as many as were asked for.

        A trial that failed stays open: it may end well when the sweep is started again.
        """
        now = self.known()
        for arm in now.arms:
            outcome = outcomes.get(run_name(arm, arm.rates[0], arm.seeds[0]))
            if outcome is not None and outcome.ok:
                self._tell(arm.name, outcome)
        over = sum(run_name(arm, arm.rates[0], arm.seeds[0]) in outcomes for arm in now.arms)
        for _ in range(min(self._total - len(now.arms), self._ahead - (len(now.arms) - over))):
            trial = self._study.ask()
            trial.set_user_attr(DRAWN, dict(self._space.draw(trial)))
        return self.known()

    def known(self) -> Study:
        """Of the trials that have been drawn."""
        drawn: dict[str, Overrides] = {
            _name(trial): trial.user_attrs[DRAWN]
            for trial in self._study.get_trials(deepcopy=False)
            if DRAWN in trial.user_attrs  # else the launcher was killed in between
        }
        return self._space.study(drawn)

    def _tell(self, name: str, outcome: Outcome) -> None:
        number = int(name.removeprefix("trial"))
        if self._study.get_trials(deepcopy=False)[number].state.is_finished():
            return
        if self._space.metric not in outcome.result:
            there = ", ".join(metric for metric in outcome.result if "/" in metric)
            raise ConfigError(
                f"{self._space.name}: METRIC={self._space.metric!r} is not in the results; there are {there}"
            )
        value = float(outcome.result[self._space.metric])
        failed = self._optuna.trial.TrialState.FAIL if math.isnan(value) else None
        self._study.tell(number, None if failed else value, state=failed)

    def _check(self) -> None:
        """Draws trials that are not kept, and makes their configs."""
        study = self._optuna.create_study(sampler=self._optuna.samplers.RandomSampler(seed=0))
        drawn: dict[str, Any] = {}
        for _ in range(SAMPLES):
            trial = study.ask()
            overrides = self._space.draw(trial)
            if not isinstance(overrides, Mapping):
                raise ConfigError(f"{self._space.name}: space(trial) gave {overrides!r}, expected a dict")
            drawn[f"sample{trial.number}"] = overrides
        check(self._space.study(drawn))


def _name(trial: Any) -> str:
    return f"trial{trial.number:03d}"

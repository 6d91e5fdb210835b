"""The simple form of a sweep: overrides over one config, each a trial, or a space that a search draws from.

A file of ``configs/sweeps/`` in this form has ``CONFIG`` ("configs/NAME.py:ARG"), and

* ``get_sweep(arg)`` that yields dicts of field and value, or
* ``space(trial)`` that returns such a dict, given an Optuna trial (``trial.suggest_float("lr", ...)``),

or both. It may have ``METRIC`` of result.json ("validation/loss") and ``BEST`` of it ("min" or "max"). Trials
that differ in ``train.seed`` alone are repetitions of one; the seed of the data follows it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from configs.base import ConfigError
from configs.overrides import module_of
from configs.study import Arm, Study

ANALYSIS = "trials"
SEED = "train.seed"
FOLLOW = {"task.seed": f"it follows {SEED}", "name": "it is the name of the trial"}
LONGEST = 80  # characters of a trial's name, which is a directory's too

Overrides = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Space:
    """What a search draws from.

    Attributes:
        config: "configs/NAME.py:ARG" that is overridden.
        metric, best: of result.json; the "min" or the "max" is searched for.
        draw: overrides, given an Optuna trial.
    """

    name: str
    question: str
    config: str
    metric: str
    best: str
    draw: Callable[[Any], Overrides]

    def study(self, drawn: Mapping[str, Overrides]) -> Study:
        """Of the trials drawn so far, by name. Raises ConfigError."""
        arms = [
            _arm(name, overrides, self.config, self.metric, self.best) for name, overrides in drawn.items()
        ]
        return _study(self.name, self.question, self.metric, self.best, arms)


def load(spec: str) -> Study:
    """The study of ``PATH[:ARG]``: what ``get_study(ARG)`` of that file returns or ``get_sweep(ARG)`` yields.

    Raises:
        FileNotFoundError: there is no such file; the message lists the sweeps beside it.
        ConfigError: the study cannot work.
    """
    module, arg = module_of("sweep", spec)
    for name in ("get_study", "get_sweep"):
        if hasattr(module, name):
            found = getattr(module, name)(*([arg] if arg else []))
            study = found if name == "get_study" else study_of(module, spec, found)
            study.validate()
            return study
    raise ConfigError(
        f"--sweep={spec}: the file has neither get_study(arg) -> Study nor get_sweep(arg) that yields dicts "
        "of field and value" + (", only space(trial), for --search=N" if hasattr(module, "space") else "")
    )


def study_of(module: ModuleType, spec: str, trials: Iterable[Any]) -> Study:
    """The study of ``trials``, dicts of field and value, over the config of the file of ``spec``.

    Raises:
        ConfigError: a trial is no such dict, or is there twice.
    """
    name, question, config, metric, best = _settings(module, spec)
    given = list(trials)
    for number, overrides in enumerate(given, 1):
        if not isinstance(overrides, Mapping):
            raise ConfigError(
                f"{name}, trial {number}: {overrides!r} should be a dict of field and value, such as "
                "{'optim.lr': 0.001}"
            )
    swept = _swept(given)
    arms: dict[str, Arm] = {}
    for number, overrides in enumerate(given, 1):
        label = label_of({field: value for field, value in overrides.items() if field in swept})
        try:
            arm = _arm(label, overrides, config, metric, best)
        except ConfigError as error:
            raise ConfigError(f"{name}, trial {number} ({label}): {error}") from error
        before = arms.get(label)
        if before is not None and (before.overrides != arm.overrides or arm.seeds[0] in before.seeds):
            raise ConfigError(
                f"{name}, trial {number}: there is a trial {label} already, with {dict(before.overrides)} "
                f"and {SEED} {before.seeds}; give another value"
            )
        arms[label] = dataclasses.replace(arm, seeds=(before.seeds if before else ()) + arm.seeds)
    return _study(name, question, metric, best, list(arms.values()))


def space_of(spec: str) -> Space:
    """What ``space(trial)`` of the file ``PATH[:ARG]`` draws from. Raises ConfigError, FileNotFoundError."""
    module, _ = module_of("sweep", spec)
    if not hasattr(module, "space"):
        raise ConfigError(
            f"--sweep={spec}: a search needs space(trial) -> dict of field and value in the file"
        )
    return Space(*_settings(module, spec), module.space)


def label_of(overrides: Overrides) -> str:
    """A trial's name, from what is swept: "lr=0.003,d_model=64"; where the last part of a field's name
    occurs twice, the whole name."""
    last = [str(field).rpartition(".")[2] for field in overrides]
    words = []
    for field, short in zip(overrides, last):
        value = overrides[field]
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(f"{field if last.count(short) > 1 else short}={text}")
    label = re.sub(r"[^\w.,=+-]", "_", ",".join(words)) or "as_it_is"
    if len(label) <= LONGEST:
        return label
    digest = hashlib.sha256(label.encode()).hexdigest()[:8]
    return f"{label[: LONGEST - 9]}-{digest}"


def _swept(trials: Sequence[Overrides]) -> set[str]:
    """The fields in which trials differ, but for the seed."""
    fields = {field for overrides in trials for field in overrides} - {SEED}
    return {f for f in fields if len({repr(overrides.get(f, ...)) for overrides in trials}) > 1}


def _settings(module: ModuleType, spec: str) -> tuple[str, str, str, str, str]:
    """Name, question, config, metric, best of a file."""
    if not isinstance(getattr(module, "CONFIG", None), str):
        raise ConfigError(f'--sweep={spec}: the file should say over what: CONFIG = "configs/NAME.py:ARG"')
    path, _, arg = spec.partition(":")
    name = pathlib.Path(path).stem + (f":{arg}" if arg else "")
    question = (module.__doc__ or "").strip().partition("\n")[0]
    metric, best = getattr(module, "METRIC", "validation/loss"), getattr(module, "BEST", "min")
    return name, question, module.CONFIG, metric, best


def _study(name: str, question: str, metric: str, best: str, arms: list[Arm]) -> Study:
    return Study(name, question, ANALYSIS, tuple(arms), {"metric": metric, "best": best})


def _arm(name: str, overrides: Overrides, config: str, metric: str, best: str) -> Arm:
    fields = {field: _plain(field, value) for field, value in overrides.items()}
    for field, why in FOLLOW.items():
        if field in fields:
            raise ConfigError(f"{field} cannot be set: {why}")
    seed = fields.pop(SEED, 0)
    if type(seed) is not int:
        raise ConfigError(f"{SEED} is {seed!r}, expected int")
    return Arm(name, config, fields, factors=fields, metric=metric, best=best, seeds=(seed,))


def _plain(field: Any, value: Any) -> Any:
    """``value`` as JSON would give it back."""
    if not isinstance(field, str):
        raise ConfigError(f"{field!r} should be the name of a field, such as 'optim.lr'")
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{field} is {value!r}, a {type(value).__name__}; give a number, a string, True, False, None, or "
            "a list of them"
        ) from error

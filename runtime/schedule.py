"""Learning-rate schedules as factors of the peak rate, and the plateau controller.

A schedule is a function of the number of updates made so far, with values in [0, 1]; every optimizer group
multiplies its own peak rate by it.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

KINDS = ("constant", "cosine", "linear", "wsd", "plateau")

Schedule = Callable[[Num[Array, ""] | int], Float[Array, ""]]
PlateauState = dict[str, jax.Array]


@dataclasses.dataclass
class PlateauConfig:
    """When the rate falls, for ``kind="plateau"``.

    Attributes:
        factor: what the rate is multiplied by.
        patience: number of evaluations in a row without improvement that is put up with.
        rtol: relative improvement that counts as one.
        mode: "min" for a loss, "max" for an accuracy.
        min_factor: the rate never falls below this fraction of its peak.
    """

    factor: float = 0.5
    patience: int = 10
    rtol: float = 1e-4
    mode: str = "min"
    min_factor: float = 0.0


@dataclasses.dataclass
class ScheduleConfig:
    """Shape of the learning rate over a run: warm-up to 1, then ``kind``.

    Attributes:
        kind: "constant"; "cosine" or "linear" decay to ``end_factor``; "wsd" (warm-up, stable, decay:
            arXiv:2404.06395), constant and then linear decay over the last ``decay_fraction`` of all steps;
            "plateau", constant times the factor of :func:`update_plateau`.
        warmup_steps: length of the linear warm-up. The first update has rate 1 / warmup_steps, not zero.
        warmup_fraction: the same as a fraction of all steps; set one of the two.
        decay_fraction: length of the decay of "wsd" as a fraction of all steps.
        end_factor: fraction of the peak rate reached after the last step.
        plateau: used by "plateau" only.
    """

    kind: str = "cosine"
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    decay_fraction: float = 0.2
    end_factor: float = 0.0
    plateau: PlateauConfig = dataclasses.field(default_factory=PlateauConfig)


def make_schedule(config: ScheduleConfig, total_steps: int) -> Schedule:
    """The factor of the peak learning rate as a function of the update's index, 0 to ``total_steps`` - 1.

    Raises:
        ValueError: a field of ``config`` is out of range; the message names it.
    """
    check_schedule(config, total_steps)
    warmup = warmup_length(config, total_steps)
    decay_steps = {
        "cosine": total_steps - warmup,
        "linear": total_steps - warmup,
        "wsd": math.ceil(config.decay_fraction * total_steps),
    }.get(config.kind, 0)

    def factor(count: Num[Array, ""] | int) -> Float[Array, ""]:
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum((count + 1) / max(warmup, 1), 1.0)
        if decay_steps == 0:
            return rise
        progress = jnp.clip((count - (total_steps - decay_steps)) / decay_steps, 0.0, 1.0)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if config.kind == "cosine" else 1 - progress
        return rise * (config.end_factor + (1 - config.end_factor) * fall)

    return factor


def warmup_length(config: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up, from whichever of the two fields is set."""
    return config.warmup_steps or round(config.warmup_fraction * total_steps)


def check_schedule(config: ScheduleConfig, total_steps: int) -> None:
    """Raises ValueError naming the first field of ``config`` that is out of range."""

    def require(ok: bool, field: str, value: object, expected: str) -> None:
        if not ok:
            raise ValueError(f"optim.schedule.{field}={value!r}: expected {expected}.")

    if total_steps < 1:
        raise ValueError(f"total number of steps is {total_steps}: expected at least 1.")
    require(config.kind in KINDS, "kind", config.kind, f"one of {', '.join(KINDS)}")
    for field in ("warmup_fraction", "decay_fraction", "end_factor"):
        value = getattr(config, field)
        require(0 <= value <= 1, field, value, "a number from 0 to 1")
    both = config.warmup_steps != 0 and config.warmup_fraction != 0
    require(not both, "warmup_fraction", config.warmup_fraction, "0 when warmup_steps is set")
    warmup = warmup_length(config, total_steps)
    require(0 <= warmup < max(total_steps, 2), "warmup_steps", warmup, f"0 to {total_steps - 1}")
    if config.kind == "wsd":
        room = total_steps - warmup
        decay = math.ceil(config.decay_fraction * total_steps)
        expected = f"above 0 and at most {room / total_steps:.3g}, what the warm-up leaves of the run"
        require(0 < decay <= room, "decay_fraction", config.decay_fraction, expected)
    if config.kind == "plateau":
        plateau = config.plateau
        require(0 < plateau.factor < 1, "plateau.factor", plateau.factor, "a number between 0 and 1")
        require(plateau.patience >= 0, "plateau.patience", plateau.patience, "at least 0")
        require(0 <= plateau.rtol < 1, "plateau.rtol", plateau.rtol, "a number from 0 to below 1")
        require(plateau.mode in ("min", "max"), "plateau.mode", plateau.mode, '"min" or "max"')
        expected = "a number from 0 to 1"
        require(0 <= plateau.min_factor <= 1, "plateau.min_factor", plateau.min_factor, expected)


def init_plateau() -> PlateauState:
    """The controller before its first evaluation: scalars ``best``, ``factor`` (float32), ``bad`` (int32)."""
    return {
        "best": jnp.asarray(jnp.inf, jnp.float32),
        "bad": jnp.asarray(0, jnp.int32),
        "factor": jnp.asarray(1.0, jnp.float32),
    }


def update_plateau(
    state: PlateauState, value: Float[Array, ""] | float, config: PlateauConfig
) -> PlateauState:
    """The controller after an evaluation gave ``value``.

    The state is kept in ``TrainState.extras["plateau"]``, where the train step reads ``factor``; a resumed
    run thus goes on counting where it stopped. A NaN counts as no improvement. ``best`` holds the value
    negated when ``mode="max"``.
    """
    value = jnp.asarray(value, jnp.float32)
    value = -value if config.mode == "max" else value
    # A margin of |best| rather than of best, so that rtol means the same for negated accuracies.
    margin = jnp.where(jnp.isfinite(state["best"]), config.rtol * jnp.abs(state["best"]), 0.0)
    improved = value < state["best"] - margin
    bad = jnp.where(improved, 0, state["bad"] + 1)
    reduce = bad > config.patience
    lowered = jnp.maximum(state["factor"] * config.factor, config.min_factor)
    return {
        "best": jnp.where(improved, value, state["best"]),
        "bad": jnp.where(reduce, 0, bad).astype(jnp.int32),
        "factor": jnp.where(reduce, lowered, state["factor"]),
    }

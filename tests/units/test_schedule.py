"""Values of the schedules at their corners, messages of bad fields, and the plateau controller."""

import jax
import numpy as np
import pytest

from runtime.schedule import (
    PlateauConfig,
    ScheduleConfig,
    init_plateau,
    make_schedule,
    update_plateau,
)


def values(config, total, steps):
    schedule = make_schedule(config, total)
    return np.array([schedule(s) for s in steps])


@pytest.mark.parametrize(
    "config, expected",
    [
        (ScheduleConfig("constant", warmup_steps=4), [0.25, 1.0, 1.0, 1.0, 1.0]),
        (ScheduleConfig("plateau", warmup_steps=4), [0.25, 1.0, 1.0, 1.0, 1.0]),
        (ScheduleConfig("linear", warmup_steps=4), [0.25, 1.0, 48 / 96, 10 / 96, 0.0]),
        (ScheduleConfig("linear", warmup_steps=4, end_factor=0.5), [0.25, 1.0, 0.75, 0.5 + 5 / 96, 0.5]),
        (
            ScheduleConfig("cosine", warmup_fraction=0.04),
            [0.25, 1.0, 0.5, (1 + np.cos(np.pi * 86 / 96)) / 2, 0],
        ),
        (ScheduleConfig("wsd", warmup_steps=4, decay_fraction=0.2), [0.25, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_key_steps(config, expected):
    got = values(config, 100, [0, 3, 52, 90, 100])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_schedule_never_leaves_the_unit_interval_and_stays_at_its_end():
    for kind in ("constant", "cosine", "linear", "wsd"):
        got = values(ScheduleConfig(kind, warmup_steps=3, end_factor=0.1), 20, range(30))
        assert got.min() >= 0 and got.max() <= 1 and got.max() == 1.0
        assert kind == "constant" or np.allclose(got[20:], 0.1)


def test_schedule_of_one_step():
    assert values(ScheduleConfig("cosine"), 1, [0]) == 1.0


@pytest.mark.parametrize(
    "config, field",
    [
        (ScheduleConfig("cosin"), "optim.schedule.kind='cosin'"),
        (ScheduleConfig(warmup_steps=100), "optim.schedule.warmup_steps=100"),
        (ScheduleConfig(warmup_steps=-1), "optim.schedule.warmup_steps=-1"),
        (ScheduleConfig(warmup_fraction=1.5), "optim.schedule.warmup_fraction=1.5"),
        (ScheduleConfig(warmup_steps=5, warmup_fraction=0.1), "optim.schedule.warmup_fraction=0.1"),
        (ScheduleConfig(end_factor=2.0), "optim.schedule.end_factor=2.0"),
        (ScheduleConfig("wsd", warmup_steps=50, decay_fraction=0.6), "optim.schedule.decay_fraction=0.6"),
        (ScheduleConfig("wsd", decay_fraction=0.0), "optim.schedule.decay_fraction=0.0"),
        (ScheduleConfig("plateau", plateau=PlateauConfig(factor=1.0)), "optim.schedule.plateau.factor=1.0"),
        (ScheduleConfig("plateau", plateau=PlateauConfig(mode="up")), "optim.schedule.plateau.mode='up'"),
    ],
)
def test_bad_field_is_named(config, field):
    with pytest.raises(ValueError, match=field.replace(".", r"\.")):
        make_schedule(config, 100)


def test_plateau_lowers_after_patience_and_goes_on_exactly_after_a_restore():
    config = PlateauConfig(factor=0.5, patience=2, rtol=0.01, min_factor=0.3)
    losses = [3.0, 2.0, 1.99, float("nan"), 2.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    state, factors = init_plateau(), []
    for loss in losses:
        state = update_plateau(state, loss, config)
        factors.append(float(state["factor"]))
    # Three evaluations in a row without 1 % improvement, twice; the second time the floor holds.
    np.testing.assert_allclose(factors, [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.3, 0.3])

    resumed = init_plateau()
    for i, loss in enumerate(losses):
        if i == 4:  # between two bad evaluations: through host memory, as a checkpoint would
            resumed = jax.tree.map(lambda x: jax.device_put(np.asarray(x)), resumed)
        resumed = update_plateau(resumed, loss, config)
    assert all(np.array_equal(state[k], resumed[k]) for k in state)


def test_plateau_of_an_accuracy():
    config = PlateauConfig(factor=0.1, patience=0, rtol=0.1, mode="max")
    state = init_plateau()
    for accuracy, factor in [(0.5, 1.0), (0.6, 1.0), (0.61, 0.1), (0.7, 0.1), (0.1, 0.01)]:
        state = update_plateau(state, accuracy, config)
        np.testing.assert_allclose(state["factor"], factor, rtol=1e-6)

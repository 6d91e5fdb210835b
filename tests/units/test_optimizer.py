"""Groups, weight decay, Muon on stacked matrices, the moving average, and overrides from the command line."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from ml_collections import config_flags

from runtime.optimizer import (
    GroupConfig,
    OptimConfig,
    check_optim,
    format_table,
    group_table,
    make_optimizer,
    update_ema,
)
from runtime.schedule import ScheduleConfig

CONSTANT = ScheduleConfig("constant")
ROLES = {
    "embed": "embedding",
    "blocks": {"kernel": "matrix", "A_log": "dynamics/A", "dt_bias": "dynamics/dt", "conv": "conv"},
    "norm": "vector/norm",
    "head": "head",
}
AXES = {
    "embed": ("vocab", "embed"),
    "blocks": {
        "kernel": ("layers", "embed", "inner"),
        "A_log": ("layers", "heads"),
        "dt_bias": ("layers", "heads"),
        "conv": ("layers", None, "inner"),
    },
    "norm": ("norm",),
    "head": ("embed", "vocab_out"),
}
SHAPES = {
    "embed": (7, 4),
    "blocks": {"kernel": (3, 4, 6), "A_log": (3, 2), "dt_bias": (3, 2), "conv": (3, 2, 6)},
    "norm": (4,),
    "head": (4, 7),
}


def tree(seed):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(rng.normal(size=s), jnp.float32) for s in leaves])


def optimizer(config, total_steps=10):
    return make_optimizer(config, ROLES, AXES, tree(0), total_steps)


def updates_of(config, steps=1, params=None, zero_gradient=False):
    tx, params = optimizer(config), tree(0) if params is None else params
    state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(jnp.zeros_like, params) if zero_gradient else tree(1 + i)
        updates, state = tx.update(grads, state, params)
    return updates


def by_path(t):
    return {
        jax.tree_util.keystr(k, simple=True, separator="/"): v
        for k, v in jax.tree_util.tree_leaves_with_path(t)
    }


def test_every_leaf_is_in_exactly_one_group_the_longest_prefix():
    config = OptimConfig(
        lr=1e-3, groups={"dynamics": GroupConfig(lr_factor=0.1), "dynamics/A": GroupConfig(lr=5e-5)}
    )
    rows = {row.path: row for row in group_table(config, ROLES, AXES, tree(0))}
    assert set(rows) == set(by_path(tree(0)))
    assert {path: row.group for path, row in rows.items()} == {
        "embed": "embedding",
        "blocks/kernel": "matrix",
        "blocks/A_log": "dynamics/A",
        "blocks/dt_bias": "dynamics",
        "blocks/conv": "conv",
        "norm": "vector",
        "head": "head",
    }
    assert rows["blocks/A_log"].lr == 5e-5 and np.isclose(rows["blocks/A_log"].lr_factor, 0.05)
    assert np.isclose(rows["blocks/dt_bias"].lr, 1e-4)
    assert [path for path, row in rows.items() if row.weight_decay] == ["blocks/kernel"]
    text = format_table(list(rows.values()))
    assert "3x4x6" in text and "matrix: 72 parameters" in text and len(text.splitlines()) == 8 + 1 + 7


def test_decay_only_where_said():
    config = OptimConfig(lr=0.5, weight_decay=0.1, schedule=CONSTANT)
    config.groups = {"embedding": GroupConfig(weight_decay=0.2)}
    got, params = by_path(updates_of(config, zero_gradient=True)), by_path(tree(0))
    for path, update in got.items():
        decay = {"blocks/kernel": 0.1, "embed": 0.2}.get(path, 0.0)
        np.testing.assert_allclose(update, -0.5 * decay * params[path], atol=1e-7)


def test_learning_rate_of_a_group_scales_its_update_alone():
    base = by_path(updates_of(OptimConfig(schedule=CONSTANT)))
    slow = OptimConfig(schedule=CONSTANT, groups={"dynamics/A": GroupConfig(lr_factor=0.1)})
    for path, update in by_path(updates_of(slow)).items():
        np.testing.assert_allclose(update, base[path] * (0.1 if path == "blocks/A_log" else 1.0), rtol=1e-6)


def test_adamw_is_optax_adamw_after_clipping():
    config = OptimConfig(lr=0.1, weight_decay=0.3, clip_norm=0.5, schedule=ScheduleConfig("linear"))
    mask = jax.tree.map(lambda role: role == "matrix", ROLES)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(optax.linear_schedule(0.1, 0.0, 10), 0.9, 0.95, weight_decay=0.3, mask=mask),
    )
    params = tree(0)
    state = theirs.init(params)
    for i in range(3):
        expected, state = theirs.update(tree(1 + i), state, params)
    got = updates_of(config, steps=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


def test_muon_of_stacked_layers_is_muon_of_each_layer():
    config = OptimConfig(name="muon", clip_norm=None, muon_lr=0.02, schedule=CONSTANT)
    got = updates_of(config, steps=3)
    theirs = optax.contrib.muon(0.02, beta=0.95, weight_decay=0.05)
    for layer in range(3):
        params = tree(0)["blocks"]["kernel"][layer]
        state = theirs.init(params)
        for i in range(3):
            expected, state = theirs.update(tree(1 + i)["blocks"]["kernel"][layer], state, params)
        np.testing.assert_allclose(got["blocks"]["kernel"][layer], expected, rtol=1e-4, atol=1e-6)
    adam = updates_of(OptimConfig(clip_norm=None, schedule=CONSTANT), steps=3)
    for path, update in by_path(got).items():
        if path != "blocks/kernel":
            np.testing.assert_allclose(update, by_path(adam)[path], rtol=1e-6)


def test_muon_direction_has_near_unit_singular_values():
    config = OptimConfig(name="muon", muon_lr=1.0, muon_weight_decay=0.0, schedule=CONSTANT)
    values = np.linalg.svd(updates_of(config)["blocks"]["kernel"], compute_uv=False) / (6 / 4) ** 0.5
    assert values.min() > 0.3 and values.max() < 1.3


def test_frozen_group_neither_moves_nor_keeps_moments():
    config = OptimConfig(groups={"embedding": GroupConfig(algorithm="frozen")}, schedule=CONSTANT)
    assert not np.any(updates_of(config)["embed"])
    moments = [x for x in jax.tree.leaves(optimizer(config).init(tree(0))) if x.shape == SHAPES["embed"]]
    assert not moments


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "sgd"}, "optim.name='sgd'"),
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"b2": 1.0}, "optim.b2=1.0"),
        ({"clip_norm": 0.0}, "optim.clip_norm=0.0"),
        ({"accumulation": 0}, "optim.accumulation=0"),
        ({"ema_decay": 1.0}, "optim.ema_decay=1.0"),
        ({"groups": {"matrix": GroupConfig(weight_decay=-1.0)}}, "optim.groups['matrix'].weight_decay=-1.0"),
        ({"groups": {"matrix": GroupConfig(algorithm="lion")}}, "optim.groups['matrix'].algorithm='lion'"),
        ({"groups": {"matrix": GroupConfig(lr=0.1, lr_factor=2.0)}}, "optim.groups['matrix'].lr_factor=2.0"),
        ({"groups": {"dynamic": GroupConfig()}}, "optim.groups['dynamic']: no parameter"),
        ({"groups": {"conv": GroupConfig(algorithm="muon")}}, None),
        ({"groups": {"vector": GroupConfig(algorithm="muon")}}, "parameter norm of shape (4,)"),
        ({"schedule": ScheduleConfig("linear", warmup_steps=11)}, "optim.schedule.warmup_steps=11"),
    ],
)
def test_errors_name_the_field(change, message):
    config = OptimConfig(**change)
    if message is None:
        optimizer(config)
        return
    with pytest.raises(ValueError) as error:
        optimizer(config)
    assert message in str(error.value)


def test_unknown_role_and_wrong_axes_name_the_parameter():
    with pytest.raises(ValueError, match="parameter norm has the role 'scale'"):
        make_optimizer(OptimConfig(), ROLES | {"norm": "scale"}, AXES, tree(0), 10)
    with pytest.raises(ValueError, match=r"parameter norm of shape \(4,\) has the axis names"):
        make_optimizer(OptimConfig(), ROLES, AXES | {"norm": ("layers", "norm")}, tree(0), 10)


def test_ema_follows_the_recurrence():
    ema, params = {"w": jnp.zeros(3)}, {"w": jnp.arange(3.0, dtype=jnp.float32).astype(jnp.bfloat16)}
    expected = np.zeros(3)
    for step in range(5):
        ema = update_ema(ema, params, 0.3, step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.arange(3.0)
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-6)


def parse(arguments, config):
    values, argv = flags.FlagValues(), ["program", *arguments]
    config_flags.DEFINE_config_dataclass("optim", config, flag_values=values, sys_argv=argv)
    values(argv)
    return values.optim


def test_fields_are_overridden_by_flags_with_their_types():
    config = OptimConfig(groups={"dynamics": GroupConfig()})
    arguments = [
        "--optim.lr=1",
        "--optim.schedule.kind=wsd",
        "--optim.clip_norm=inf",
        "--optim.ema_decay=0.9",
    ]
    config = parse([*arguments, '--optim.groups["dynamics"].lr_factor=0.1'], config)
    assert config.lr == 1.0 and isinstance(config.lr, float) and config.schedule.kind == "wsd"
    assert config.clip_norm == math.inf and config.ema_decay == 0.9
    assert config.groups["dynamics"].lr_factor == 0.1
    check_optim(config, 10)
    with pytest.raises(flags.IllegalFlagValueError):
        parse(["--optim.accumulation=many"], OptimConfig())


def test_a_rate_of_zero_trains_nothing_and_has_a_table():
    config = OptimConfig(
        lr=0.0, weight_decay=0.0, groups={"dynamics": GroupConfig(lr=1e-3)}, schedule=CONSTANT
    )
    rows = group_table(config, ROLES, AXES, tree(0))
    assert {row.lr_factor for row in rows} == {1.0, math.inf} and format_table(rows)
    moved = {row.group for row in rows if row.lr}
    assert moved == {"dynamics"}

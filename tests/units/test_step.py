"""The train step on a toy two-layer language model: exact accumulation, sharding, guards, carried state."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from runtime.mesh import batch_sharding, carry_shardings, param_shardings, state_shardings
from runtime.optimizer import OptimConfig, make_optimizer
from runtime.schedule import ScheduleConfig, update_plateau
from runtime.state import WHOLE, init_state
from runtime.step import accumulate, first_nonfinite, make_train_step, parameter_paths

V, D, F, B, L = 8, 8, 16, 8, 6
AXES = {
    "embed": ("vocab", "embed"),
    "blocks": {
        "up": ("layers", "embed", "mlp"),
        "down": ("layers", "mlp", "embed"),
        "decay": ("layers", "norm"),
    },
    "head": ("embed", "vocab_out"),
}
ROLES = {
    "embed": "embedding",
    "blocks": {"up": "matrix", "down": "matrix", "decay": "dynamics/A"},
    "head": "head",
}


def init_params():
    keys = jax.random.split(jax.random.key(1), 4)
    return {
        "embed": jax.random.normal(keys[0], (V, D)),
        "blocks": {
            "up": 0.3 * jax.random.normal(keys[1], (2, D, F)),
            "down": 0.3 * jax.random.normal(keys[2], (2, F, D)),
            "decay": jnp.zeros((2, D)),
        },
        "head": 0.3 * jax.random.normal(keys[3], (D, V)),
    }


def loss_fn(params, batch, carry, key, dropout=0.0):
    """Embedding, two blocks that add a decayed carried state and an MLP, cross-entropy by token weight."""
    x = params["embed"][batch["tokens"]]
    if dropout:
        x = x * jax.random.bernoulli(key, 1 - dropout, x.shape)
    states = jnp.zeros((2, x.shape[0], D), x.dtype) if carry is None else carry["ssm"]

    def block(x, inputs):
        p, state = inputs
        decay = jax.nn.sigmoid(p["decay"])
        x = x + (decay * state)[:, None]
        return x + jnp.tanh(x @ p["up"]) @ p["down"], x.mean(1)

    x, states = jax.lax.scan(block, x, (params["blocks"], states))
    logits = x @ params["head"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    correct = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
    weight = batch["weights"].sum()
    new = None if carry is None else {"ssm": states, "seen": carry["seen"] + weight}
    return ((losses * batch["weights"]).sum(), weight), (new, {"accuracy": (correct.sum(), weight)})


def make_batch(seed=0, batch_size=B):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (batch_size, L + 1)).astype(np.int32)
    # Very unequal weights a row: a mean of microbatch means would be off.
    weights = (rng.random((batch_size, L)) < np.linspace(0.1, 1, batch_size)[:, None]).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def carried():
    return {"ssm": jnp.zeros((2, B, D)), "seen": jnp.zeros(())}


CARRY_AXES = {"ssm": 1, "seen": WHOLE}


def setup(config=None, carry=False, mesh=None, total_steps=10, loss=loss_fn, params=init_params):
    config = config or OptimConfig(lr=0.01, schedule=ScheduleConfig("linear", warmup_steps=2))
    shapes = jax.eval_shape(params)
    tx = make_optimizer(config, ROLES, AXES, shapes, total_steps)
    axes = CARRY_AXES if carry else 0

    def init():
        return init_state(params(), tx, config, carried() if carry else None)

    shardings = None
    if mesh is not None:
        abstract = jax.eval_shape(init)
        extras = {"carry": carry_shardings(mesh, abstract.extras["carry"], axes)} if carry else None
        shardings = state_shardings(mesh, tx, abstract, param_shardings(mesh, AXES, shapes), extras)
    state = jax.jit(init, out_shardings=shardings)()
    step = make_train_step(loss, tx, config, total_steps, shardings=shardings, carry_axes=axes)
    return state, step


def run(steps=3, **kwargs):
    state, step = setup(**kwargs)
    mesh = kwargs.get("mesh")
    history = []
    for i in range(steps):
        batch = make_batch(i)
        if mesh is not None:
            batch = jax.device_put(batch, batch_sharding(mesh))
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return jax.device_get(state), history


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_loss_falls_and_metrics_are_what_they_say():
    state, step = setup()
    params = init_params()
    batch = make_batch()
    (loss_sum, weight), _ = loss_fn(params, batch, None, None)
    grads = jax.grad(lambda p: loss_fn(p, batch, None, None)[0][0] / weight)(params)
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss_sum / weight, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight"], batch["weights"].sum())
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(params), rtol=1e-5)
    moved = jax.tree.map(jnp.subtract, state.params, params)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(moved), rtol=1e-4)
    assert metrics["finite"] and metrics["nonfinite_parameter"] == -1 and int(state.step) == 1
    rates = [float(metrics["learning_rate"])]
    for _ in range(5):
        state, later = step(state, batch)
        rates.append(float(later["learning_rate"]))
    np.testing.assert_allclose(rates, 0.01 * np.array([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8]), rtol=1e-6)
    assert later["loss"] < metrics["loss"]


def test_state_is_donated():
    state, step = setup(OptimConfig(ema_decay=0.9, skip_nonfinite=True))
    new, _ = step(state, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulated_gradient_is_the_gradient_of_the_whole_batch(microbatches):
    state, _ = setup(carry=True)
    state.extras["carry"]["ssm"] = jax.random.normal(jax.random.key(3), (2, B, D))
    gradient = jax.jit(functools.partial(accumulate, loss_fn, carry_axes=CARRY_AXES), static_argnums=3)
    whole = gradient(state, make_batch(), jax.random.key(0), 1)
    parts = gradient(state, make_batch(), jax.random.key(0), microbatches)
    assert_close(parts.grads, whole.grads, rtol=1e-5, atol=1e-5)
    assert_close(parts.sums, whole.sums, rtol=1e-6)
    assert_close(parts.carry, whole.carry, rtol=1e-6, atol=1e-6)  # row r stays row r
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(parts.grads))


def test_bfloat16_parameters_have_float32_gradients_moments_and_average():
    def params():
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), init_params())

    state, step = setup(OptimConfig(name="muon", accumulation=2, ema_decay=0.9), params=params)
    gradient = functools.partial(accumulate, loss_fn, microbatches=2)
    total = jax.eval_shape(gradient, state, make_batch(), key=jax.random.key(0))
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(total.grads))
    new, _ = jax.eval_shape(step, state, make_batch())
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    moments = jax.tree.leaves((state.opt_state, state.extras["ema"]))
    assert {x.dtype for x in moments if x.ndim > 1} == {jnp.dtype(jnp.float32)}


def test_accumulation_that_does_not_divide_the_batch():
    state, step = setup(OptimConfig(accumulation=3))
    with pytest.raises(ValueError, match=r"task\.batch_size=8 must be a multiple of optim\.accumulation=3"):
        step(state, make_batch())


def test_sharded_step_is_the_unsharded_one(mesh):
    for accumulation in (1, 2):
        config = OptimConfig(name="muon", lr=0.01, accumulation=accumulation, ema_decay=0.9)
        alone, expected = run(config=config, carry=True)
        state, got = run(config=config, carry=True, mesh=mesh(2, 2, 2, 1))
        assert_close(got, expected, rtol=2e-4, atol=1e-5)
        assert_close(state.params, alone.params, rtol=1e-3, atol=1e-4)
        assert_close(state.extras, alone.extras, rtol=1e-3, atol=1e-4)


def test_microbatches_do_not_gather_the_batch(mesh):
    mesh = mesh(2, 1, 1, 1)
    texts = []
    for accumulation in (1, 2):
        state, step = setup(OptimConfig(accumulation=accumulation), mesh=mesh, carry=True)
        batch = jax.device_put(make_batch(), batch_sharding(mesh))
        texts.append(step.lower(state, batch).compile().as_text())
    for text in texts:
        assert not re.findall(r"= \S+ (all-gather|all-to-all|collective-permute)\(", text)
        assert re.findall(r"all-reduce\(", text)  # of the gradient: the search sees collectives


def test_two_runs_are_equal_to_the_bit_and_dropout_follows_step_and_microbatch():
    loss = functools.partial(loss_fn, dropout=0.5)
    config = OptimConfig(accumulation=2)
    first, second = run(config=config, loss=loss), run(config=config, loss=loss)
    assert_equal(first, second)
    state, step = setup(config, loss=loss)
    again = jax.tree.map(jnp.copy, state).replace(step=jnp.asarray(1, jnp.int32))
    assert step(state, make_batch())[1]["loss"] != step(again, make_batch())[1]["loss"]


def test_carried_state_reaches_the_next_batch_and_whole_arrays_count_once():
    state, history = run(config=OptimConfig(accumulation=2), carry=True)
    np.testing.assert_allclose(state.extras["carry"]["seen"], sum(h["weight"] for h in history))
    without, _ = run(config=OptimConfig(accumulation=2))
    assert not np.allclose(state.params["embed"], without.params["embed"])


def poisoned(params, batch, carry, key):
    """A loss whose gradient for ``blocks/down`` is NaN in the batch that says so."""
    params = params | {"blocks": dict(params["blocks"])}
    bad = jnp.where(batch["weights"].sum() < 0, jnp.nan, 1.0)
    params["blocks"]["down"] = params["blocks"]["down"] * bad
    (loss_sum, weight), rest = loss_fn(params, batch, carry, key)
    return (loss_sum, jnp.abs(weight)), rest


def bad_batch():
    batch = make_batch()
    return batch | {"weights": -batch["weights"]}


def test_nonfinite_step_is_skipped_and_counted():
    config = OptimConfig(skip_nonfinite=True, ema_decay=0.9, schedule=ScheduleConfig("linear"))
    state, step = setup(config, carry=True, loss=poisoned)
    state, _ = step(state, make_batch())
    before = jax.device_get(state)
    state, metrics = step(state, bad_batch())
    assert not metrics["finite"] and metrics["skipped"] == 1 and int(state.step) == 2
    after = jax.device_get(state)
    assert_equal((after.params, after.opt_state), (before.params, before.opt_state))
    assert_equal((after.extras["ema"], after.extras["carry"]), (before.extras["ema"], before.extras["carry"]))
    state, metrics = step(state, make_batch())
    assert metrics["finite"] and metrics["skipped"] == 1
    np.testing.assert_allclose(
        metrics["learning_rate"], 1e-3 * 0.9, rtol=1e-6
    )  # the second update, not third


def test_nonfinite_gradient_is_named():
    state, step = setup(loss=poisoned)
    paths = parameter_paths(state.params)
    state, metrics = step(state, bad_batch())
    assert not metrics["finite"]
    assert (
        paths[int(metrics["nonfinite_parameter"])] == "blocks/decay"
    )  # in order: every gradient is NaN here
    assert "blocks/down" in first_nonfinite(state.params)
    tree = {
        "a": jnp.ones(2),
        "b": {"c": jnp.array([1.0, jnp.inf]), "d": jnp.arange(3)},
        "e": jnp.array(jnp.nan),
    }
    assert first_nonfinite(tree) == ["b/c", "e"]


def test_first_gradient_that_overflows_is_found_alone():
    def loss(params, batch, carry, key):
        (loss_sum, weight), rest = loss_fn(params, batch, carry, key)
        return (loss_sum + jnp.sqrt(params["head"] * 0.0).sum(), weight), rest  # 0 with an infinite slope

    state, step = setup(loss=loss)
    paths = parameter_paths(state.params)
    _, metrics = step(state, make_batch())
    assert np.isfinite(metrics["loss"]) and not metrics["finite"]
    assert paths[int(metrics["nonfinite_parameter"])] == "head"


def test_batch_without_weight_changes_nothing_but_decay():
    state, step = setup(OptimConfig(weight_decay=0.0))
    batch, before = make_batch(), jax.device_get(state.params)
    state, metrics = step(state, batch | {"weights": 0 * batch["weights"]})
    assert metrics["loss"] == 0 and metrics["finite"]
    assert_equal(jax.device_get(state.params), before)


def test_ema_is_kept_and_evaluated():
    config = OptimConfig(ema_decay=0.05, lr=0.01)
    expected = init_params()
    state, step = setup(config)
    for i in range(2):
        state, _ = step(state, make_batch(i))
        expected = jax.tree.map(
            lambda e, p: 0.05 * e + 0.95 * p, expected, jax.tree.map(jnp.copy, state.params)
        )
    assert_close(state.eval_params, expected, rtol=1e-5, atol=1e-6)
    plain, _ = setup()
    assert plain.eval_params is plain.params


def test_plateau_factor_scales_update_and_survives_a_restore():
    config = OptimConfig(schedule=ScheduleConfig("plateau"))
    state, step = setup(config)
    low = jax.tree.map(jnp.copy, state)
    for value in [1.0] * (config.schedule.plateau.patience + 2):
        low.extras["plateau"] = update_plateau(low.extras["plateau"], value, config.schedule.plateau)
    low = jax.tree.map(jnp.asarray, jax.device_get(low))
    _, full = step(state, make_batch())
    low, half = step(low, make_batch())
    np.testing.assert_allclose(half["learning_rate"], 0.5 * full["learning_rate"])
    np.testing.assert_allclose(half["update_norm"], 0.5 * full["update_norm"], rtol=1e-6)
    np.testing.assert_allclose(low.extras["plateau"]["best"], 1.0)


def test_metric_with_a_reserved_name_is_refused():
    def loss(params, batch, carry, key):
        pair, (new, metrics) = loss_fn(params, batch, carry, key)
        return pair, (new, metrics | {"grad_norm": pair})

    state, step = setup(loss=loss)
    with pytest.raises(ValueError, match="grad_norm"):
        step(state, make_batch())

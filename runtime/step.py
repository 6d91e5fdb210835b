"""One train step: gradient of a token-weighted loss, accumulation over microbatches, guarded update."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from runtime.freeze import pick, put_back
from runtime.optimizer import OptimConfig, parameter_path, update_ema
from runtime.schedule import make_schedule
from runtime.state import WHOLE, TrainState

Pair = tuple[jax.Array, jax.Array]  # (sum, weight) of what is reported as sum / weight
LossFn = Callable[..., tuple[Pair, tuple[PyTree, dict[str, Pair]]]]
TrainStep = Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]]

REPORTED = (
    "loss",
    "weight",
    "grad_norm",
    "param_norm",
    "update_norm",
    "learning_rate",
    "finite",
    "nonfinite_parameter",
    "skipped",
)
"""Names of the step's own metrics; a task's metrics have other names."""


class NonFiniteError(RuntimeError):
    """The loss or a gradient of a step is not finite."""


class Gradient(NamedTuple):
    """Sums over a (micro)batch: gradient of the loss sum, (sum, weight) by metric, and the carried states."""

    grads: PyTree
    sums: dict[str, Pair]
    carry: PyTree


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    config: OptimConfig,
    total_steps: int,
    *,
    seed: int = 0,
    shardings: PyTree = None,
    carry_axes: PyTree = 0,
    trained: PyTree = None,
) -> TrainStep:
    """The jitted ``step(state, batch) -> (state, metrics)``; it donates ``state``.

    Args:
        loss_fn: ``(params, batch, carry, key) -> ((loss_sum, weight), (carry, metrics))``. The loss minimised
            is loss_sum / weight over the whole batch, whatever the number of microbatches. ``metrics`` is a
            dict of (sum, weight) pairs. ``carry`` is None in and out when the state holds none; no gradient
            flows through it. ``key`` depends on ``seed``, the step and the microbatch only.
        tx: from ``make_optimizer(config, ...)``.
        shardings: of the state, from ``state_shardings``; None on a single device.
        carry_axes: axis of B in the carried arrays, an int or a tree prefix of ints; ``WHOLE`` marks an array
            without one (normalisation statistics), which passes from microbatch to microbatch.
        trained: a bool a parameter, from ``trained_parameters``; None for all. The gradient with respect to
            the others is not computed, and they stay the same to the bit.

    The metrics are float32 scalars: the task's, and ``loss``, ``weight``, ``grad_norm`` (before clipping),
    ``param_norm`` (before the update), ``update_norm``, ``learning_rate`` (of ``optim.lr``). Besides:
    ``finite`` (bool: loss and gradient), ``nonfinite_parameter`` (int32: index in :func:`parameter_paths` of
    the first parameter whose gradient is not, -1 for none) and, with ``skip_nonfinite``, ``skipped`` (int32:
    updates left out so far).
    """
    schedule = make_schedule(config.schedule, total_steps)

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        params = None if shardings is None else shardings.params
        total = accumulate(loss_fn, state, batch, key, config.accumulation, carry_axes, params, trained)
        weight = total.sums["loss"][1]
        grads = jax.tree.map(lambda g: g / jnp.where(weight == 0, 1.0, weight), total.grads)
        metrics = {name: s / jnp.where(w == 0, 1.0, w) for name, (s, w) in total.sums.items()}
        # In the order of all parameters, which nonfinite_parameter counts in: 0 for those that are frozen.
        zeros = jax.tree.map(lambda _: jnp.zeros(()), state.params)
        norms = put_back(zeros, jax.tree.map(lambda g: jnp.sum(jnp.square(g)), grads))
        squares = jnp.stack(jax.tree.leaves(norms))
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(squares).all()

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        # Updates are counted by the optimizer, which does not see those left out.
        rate = config.lr * schedule(state.step - state.extras.get("skipped", 0))
        if "plateau" in state.extras:
            factor = state.extras["plateau"]["factor"]
            updates, rate = jax.tree.map(lambda u: u * factor, updates), rate * factor
        new = _apply(state, updates, opt_state, total.carry, config)
        if config.skip_nonfinite:
            new = _keep_unless(finite, new, state)
            metrics["skipped"] = new.extras["skipped"]
        metrics |= {
            "weight": weight,
            "grad_norm": jnp.sqrt(squares.sum()),
            "param_norm": optax.tree.norm(state.params),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": rate,
            "finite": finite,
            "nonfinite_parameter": _first_false(jnp.isfinite(squares)),
        }
        return new, metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    replicated = NamedSharding(shardings.step.mesh, PartitionSpec())
    return jax.jit(step, out_shardings=(shardings, replicated), donate_argnums=0)


def accumulate(
    loss_fn: LossFn,
    state: TrainState,
    batch: PyTree,
    key: Array,
    microbatches: int,
    carry_axes: PyTree = 0,
    param_shardings: PyTree = None,
    trained: PyTree = None,
) -> Gradient:
    """Float32 sums over ``batch`` (leaves [B, ...]), computed in ``microbatches`` parts one after the other.

    Microbatch i is rows i, i + m, i + 2 m, ...: with B sharded, every device then finds its part of each
    microbatch among its own rows, where a split into contiguous blocks would gather the batch.

    Raises:
        ValueError: B is not a multiple of ``microbatches``, or a metric has a reserved name.
    """
    carry = state.extras.get("carry")
    if microbatches == 1:
        return _gradient(loss_fn, state.params, batch, carry, key, trained)
    size = jax.tree.leaves(batch)[0].shape[0]
    if size % microbatches:
        raise ValueError(f"task.batch_size={size} must be a multiple of optim.accumulation={microbatches}.")
    axes = jax.tree.map(lambda axis, part: jax.tree.map(lambda _: axis, part), carry_axes, carry)

    def part(totals: tuple[PyTree, PyTree], xs: tuple[Array, PyTree]) -> tuple[tuple[PyTree, PyTree], dict]:
        grads, carry = totals
        index, rows = xs
        mine = jax.tree.map(lambda a, x: x if a == WHOLE else x[index], axes, carry)
        out = _gradient(loss_fn, state.params, rows, mine, jax.random.fold_in(key, index), trained)
        grads = jax.tree.map(jnp.add, grads, out.grads)
        if param_shardings is not None:
            # Else the accumulator, a copy of all parameters, could end up whole on every device.
            grads = jax.lax.with_sharding_constraint(grads, pick(param_shardings, trained))
        carry = jax.tree.map(
            lambda a, x, new: new if a == WHOLE else x.at[index].set(new), axes, carry, out.carry
        )
        return (grads, carry), out.sums

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), pick(state.params, trained))
    carry = jax.tree.map(lambda a, x: x if a == WHOLE else _split(x, microbatches, a), axes, carry)
    rows = jax.tree.map(lambda x: _split(x, microbatches, 0), batch)
    (grads, carry), sums = jax.lax.scan(part, (zeros, carry), (jnp.arange(microbatches), rows))
    carry = jax.tree.map(lambda a, x: x if a == WHOLE else _join(x, a), axes, carry)
    return Gradient(grads, jax.tree.map(lambda s: s.sum(0), sums), carry)


def parameter_paths(params: PyTree) -> list[str]:
    """Paths of the leaves, in the order that ``nonfinite_parameter`` counts them in."""
    return [parameter_path(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def first_nonfinite(tree: PyTree) -> list[str]:
    """Paths of the leaves of ``tree`` (parameters, gradients, batch) with a NaN or infinity, in order."""
    finite = jax.device_get(jax.jit(_leaves_finite)(tree))
    return [path for path, ok in zip(parameter_paths(tree), finite) if not ok]


def _leaves_finite(tree: PyTree) -> list[jax.Array]:
    return [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]


def _gradient(
    loss_fn: LossFn, params: PyTree, batch: PyTree, carry: PyTree, key: Array, trained: PyTree
) -> Gradient:
    """Gradient of the loss sum over one microbatch, with respect to what is trained."""

    def objective(part: PyTree) -> tuple[jax.Array, tuple[PyTree, dict[str, Pair]]]:
        (loss_sum, weight), (new_carry, metrics) = loss_fn(put_back(params, part), batch, carry, key)
        taken = sorted(set(metrics) & set(REPORTED))
        if taken:
            raise ValueError(f"the task's metrics {taken} have names that the train step reports itself.")
        sums = {"loss": (loss_sum, weight), **metrics}
        sums = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sums)
        return sums["loss"][0], (new_carry, sums)

    grads, (new_carry, sums) = jax.grad(objective, has_aux=True)(pick(params, trained))
    return Gradient(jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums, new_carry)


def _apply(
    state: TrainState, updates: PyTree, opt_state: PyTree, carry: PyTree, config: OptimConfig
) -> TrainState:
    """The state after an update."""
    params = jax.tree.map(
        lambda p, u: p if isinstance(u, optax.MaskedNode) else optax.apply_updates(p, u),
        state.params,
        updates,
    )
    extras = dict(state.extras)
    if config.ema_decay is not None:
        extras["ema"] = update_ema(extras["ema"], params, config.ema_decay, state.step)
    if "carry" in extras:
        extras["carry"] = carry
    return TrainState(state.step + 1, params, opt_state, extras)


def _keep_unless(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """``new`` where ``finite``; else ``old`` after one more batch, left out."""
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    skipped = old.extras["skipped"] + jnp.where(finite, 0, 1)
    return kept.replace(step=new.step, extras={**kept.extras, "skipped": skipped})


def _first_false(ok: Array) -> Int[Array, ""]:
    """Index of the first False in ``ok`` [n], -1 for none."""
    return jnp.where(ok.all(), -1, jnp.argmin(ok)).astype(jnp.int32)


def _split(x: Array, parts: int, axis: int) -> Array:
    """[.., B, ..] to [parts, .., B / parts, ..]; part i holds rows i, i + parts, ..."""
    x = x.reshape(*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 0)


def _join(x: Array, axis: int) -> Array:
    """The inverse of :func:`_split`."""
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

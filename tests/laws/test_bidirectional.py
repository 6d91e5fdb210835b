"""The laws of a mixer that reads both ways, over every one of the registry. A new one needs no new test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.types import Context, SequenceMixer
from tests.laws import cases
from tests.laws.cases import BATCH, BIDIRECTIONAL, LENGTH, close, compiled, functional, inputs

pytestmark = pytest.mark.parametrize("name", BIDIRECTIONAL)


def test_it_has_no_state_and_refuses_one(name):
    model, params = functional(name)
    mixer = model.bind(params)
    assert isinstance(mixer, SequenceMixer) and not mixer.causal
    assert mixer.flops_per_token(64) > 0
    x = inputs()
    y, state = compiled(name)(params, x)
    assert y.shape == x.shape and state is None
    with pytest.raises(ValueError, match="bidirectional"):
        mixer.init_state(BATCH, 64)
    with pytest.raises(ValueError, match="bidirectional"):
        mixer(x, jnp.zeros((BATCH, 4)), Context.create(BATCH, LENGTH))


def test_it_reads_both_ways(name):
    _, params = functional(name)
    x, t = inputs(), LENGTH // 2
    change = np.abs(compiled(name)(params, x)[0] - compiled(name)(params, x.at[:, t].add(1.0))[0])
    assert all(change[:, s].max() > 1e-6 for s in (t - 1, t, t + 1))


def test_packed_documents_are_separate_runs(name):
    """Values and gradients, with whatever stands at padding."""
    _, params = functional(name)
    ids, weights = cases.PACKED_ALIKE, inputs(seed=1)
    x = jnp.where((ids == 0)[..., None], 7.0, inputs())
    each = cases.documents_by_length(ids)

    def packed(params, x):
        y = compiled(name)(params, x, None, ids)[0]
        return jnp.sum(y * weights * (ids != 0)[..., None]), y

    def separate(params, x):
        ys = {length: compiled(name)(params, x[at])[0] for length, at in each.items()}
        return sum(jnp.sum(ys[length] * weights[at]) for length, at in each.items()), ys

    run = lambda f: jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, x)  # noqa: E731
    ((_, together), got), ((_, alone), want) = run(packed), run(separate)
    for length, at in each.items():
        close(together[at], alone[length])
    close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_invisible(name, left):
    _, params = functional(name)
    x, lengths = inputs(length=9), (9, 4)
    at = [slice(9 - n, 9) if left else slice(0, n) for n in lengths]
    padded, ids = np.full(x.shape, 7.0, np.float32), np.zeros((BATCH, 9), np.int32)
    for row, n in enumerate(lengths):
        padded[row, at[row]], ids[row, at[row]] = x[row, :n], 1
    y = compiled(name)(params, jnp.asarray(padded), None, jnp.asarray(ids))[0]
    for row, n in enumerate(lengths):
        close(y[row, at[row]], compiled(name)(params, x[row : row + 1, :n])[0][0])


def test_rows_do_not_see_each_other(name):
    _, params = functional(name)
    x = inputs()
    together = compiled(name)(params, x)[0]
    for row in range(BATCH):
        close(compiled(name)(params, x[row : row + 1])[0], together[row : row + 1], atol=5e-6)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_lengths(name, length):
    """As one segment, with and without ids: the ops that run are not the same."""
    _, params = functional(name)
    x = inputs(length=length)
    with_ids = compiled(name)(params, x, None, jnp.ones((BATCH, length), jnp.int32))[0]
    close(compiled(name)(params, x)[0], with_ids)


def test_bfloat16_is_close_to_float32(name):
    _, params = functional(name)
    exact = compiled(name)(params, inputs())[0]
    rough = compiled(name)(params, inputs().astype(jnp.bfloat16))[0]
    assert rough.dtype == jnp.bfloat16
    assert np.abs(np.asarray(rough, np.float32) - exact).max() < 0.05 * np.abs(exact).max()


FOUR = jnp.tile(jnp.repeat(jnp.arange(4), jnp.asarray([3, 9, 11, 9]))[None], (4, 1))


def loss_and_gradients(name):
    """Of packed rows, and of one segment without ids."""
    model, params = functional(name)

    def loss(params, x):
        read = lambda ids: model.bind(params)(x, None, Context.create(*x.shape[:2], segment_ids=ids))  # noqa: E731
        y, whole = read(FOUR)[0], read(None)[0]
        return jnp.sum(jnp.sin(y) * (FOUR != 0)[..., None]) + jnp.sum(jnp.cos(whole))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, inputs(4, 32))


unsharded = functools.cache(loss_and_gradients)


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (1, 2, 4, 1)], ids=str)
def test_sharded_is_unsharded(name, shape, mesh):
    want = unsharded(name)
    with jax.set_mesh(mesh(*shape)):
        got = loss_and_gradients(name)
    close(got, want, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(name, platform):
    _, params = functional(name)

    def loss(params, x):
        return jnp.sum(compiled(name)(params, x)[0] ** 2)

    traced = jax.jit(jax.grad(loss)).trace(params, inputs())
    assert "func" in traced.lower(lowering_platforms=(platform,)).as_text()

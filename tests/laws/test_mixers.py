"""The laws of a sequence mixer, over every mixer of the registry. A new mixer needs no new test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.types import Context, SequenceMixer
from pallas_kernels import time_order
from tests.laws import cases
from tests.laws.cases import BATCH, LENGTH, MIXERS, PACKED, close, compiled, empty_state, functional, inputs

pytestmark = pytest.mark.parametrize("name", MIXERS)


def test_contract(name):
    model, params = functional(name)
    mixer = model.bind(params)
    assert isinstance(mixer, SequenceMixer)
    assert mixer.flops_per_token(64) > 0
    assert all(isinstance(role, str) for role in jax.tree.leaves(model.roles))
    for shape, axes in zip(
        jax.tree.leaves(model.shapes), jax.tree.leaves(model.axes, is_leaf=lambda a: isinstance(a, tuple))
    ):
        assert len(axes) == shape.ndim


def test_causality_to_the_bit(name):
    model, params = functional(name)
    x, t = inputs(), LENGTH // 2
    base = compiled(name)(params, x)[0]
    changed = compiled(name)(params, x.at[:, t].add(1.0))[0]
    if getattr(model.bind(params), "exact_causality", True):
        np.testing.assert_array_equal(base[:, :t], changed[:, :t])
    else:  # an FFT mixes all times, and cancels the later ones to rounding errors
        close(base[:, :t], changed[:, :t], atol=5e-6)
    assert np.abs(np.asarray(base - changed))[:, t].max() > 1e-4


@pytest.mark.parametrize("splits", [(LENGTH,), (1, 20), (8, 8, 5), (3, 9, 9), (1,) * LENGTH], ids=str)
def test_any_split_with_carried_state_is_one_pass(name, splits):
    _, params = functional(name)
    x = inputs()
    whole, no_state = compiled(name)(params, x)
    assert no_state is None
    pieces, state = cases.stream(name, x, splits)
    close(pieces, whole)
    _, one_pass_state = cases.stream(name, x, (LENGTH,))
    close(state, one_pass_state)


@pytest.mark.parametrize("splits", [(LENGTH,), (10, 11), (1,) * LENGTH], ids=str)
def test_packed_documents_are_separate_runs(name, splits):
    _, params = functional(name)
    x = inputs()
    packed = compiled(name)(params, x, None, PACKED)[0]
    streamed, _ = cases.stream(name, x, splits, PACKED)
    for row, start, stop in cases.documents():
        alone = compiled(name)(params, x[row : row + 1, start:stop])[0][0]
        close(packed[row, start:stop], alone)
        close(streamed[row, start:stop], alone)


def test_packed_gradients_are_separate_gradients(name):
    _, params = functional(name)
    x, weights = inputs(), inputs(seed=1)

    ids = cases.PACKED_ALIKE

    def packed(params, x):
        y = compiled(name)(params, x, None, ids)[0]
        return jnp.sum(y * weights * (ids != 0)[..., None])

    def separate(params, x):
        each = cases.documents_by_length(ids).values()
        return sum(jnp.sum(compiled(name)(params, x[at])[0] * weights[at]) for at in each)

    got, want = (jax.grad(f, argnums=(0, 1))(params, x) for f in (packed, separate))
    close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_prompts_prefill_and_decode_as_if_alone(name, left):
    _, params = functional(name)
    x, lengths, new = inputs(length=14), (9, 4), 3
    padded, ids = np.zeros((BATCH, 9, x.shape[-1]), np.float32), np.zeros((BATCH, 9), np.int32)
    for row, n in enumerate(lengths):
        at = slice(9 - n, 9) if left else slice(0, n)
        padded[row, at], ids[row, at] = x[row, :n], 1
    padded[ids == 0] = 7.0  # whatever stands at padding must not matter
    tail = jnp.stack([x[row, n : n + new] for row, n in enumerate(lengths)])
    stream_x = jnp.concatenate([jnp.asarray(padded), tail], 1)
    stream_ids = jnp.concatenate([jnp.asarray(ids), jnp.ones((BATCH, new), jnp.int32)], 1)
    y, _ = cases.stream(name, stream_x, (9,) + (1,) * new, stream_ids)
    for row, n in enumerate(lengths):
        alone = compiled(name)(params, x[row : row + 1, : n + new])[0][0]
        close(y[row, 9:], alone[n:])


def test_padding_only_leaves_the_state_alone(name):
    _, params = functional(name)
    _, state = cases.stream(name, inputs(length=5), (5,))
    segment, position = jnp.ones(BATCH, jnp.int32), jnp.full(BATCH, 4)
    nothing = jnp.zeros((BATCH, 5), jnp.int32)
    _, after = compiled(name)(params, inputs(length=5, seed=2), state, nothing, segment, position)
    close(after, state, atol=0, rtol=0)


def test_rows_do_not_see_each_other(name):
    _, params = functional(name)
    x = inputs()
    together = compiled(name)(params, x)[0]
    for row in range(BATCH):
        close(compiled(name)(params, x[row : row + 1])[0], together[row : row + 1], atol=5e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9])
def test_lengths(name, length):
    _, params = functional(name)
    x = inputs()
    close(compiled(name)(params, x[:, :length])[0], compiled(name)(params, x)[0][:, :length])


def test_gradients_are_those_of_the_reference_ops(name, monkeypatch):
    model, params = functional(name)
    x, weights = inputs(), inputs(seed=3)
    state = jax.tree.map(jnp.asarray, cases.stream(name, inputs(length=5, seed=4), (5,))[1])

    def loss(params, x, state, run):
        segment, position = jnp.ones(BATCH, jnp.int32), jnp.full(BATCH, 4)
        y, after = run(params, x, state, None, segment, position)
        floats = [s for s in jax.tree.leaves(after) if jnp.issubdtype(s.dtype, jnp.floating)]
        return jnp.sum(y * weights) + sum(jnp.sum(jnp.sin(s)) for s in floats)

    grad = jax.grad(loss, argnums=(0, 1, 2), allow_int=True)
    got = grad(params, x, state, compiled(name))
    monkeypatch.setenv("LONGSPAN_IMPLEMENTATION", "reference")
    cases.compiled.cache_clear()
    want = grad(params, x, state, compiled(name))
    cases.compiled.cache_clear()
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        if g.dtype != jax.dtypes.float0:
            assert np.isfinite(g).all()
            close(g, w, atol=1e-4, rtol=1e-3)


def test_bfloat16_is_close_to_float32(name):
    _, params = functional(name)
    x = inputs()
    exact = compiled(name)(params, x)[0]
    rough = compiled(name)(params, x.astype(jnp.bfloat16))[0]
    assert rough.dtype == jnp.bfloat16
    scale = np.abs(np.asarray(exact)).max()
    assert np.abs(np.asarray(rough, np.float32) - np.asarray(exact)).max() < 0.05 * scale


def test_state_keeps_its_declared_shape(name):
    declared = jax.eval_shape(lambda: empty_state(name))
    _, state = cases.stream(name, inputs(), (10, 11))
    assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == jax.tree.map(
        lambda s: (s.shape, s.dtype), declared
    )
    model, params = functional(name)
    longer = jax.eval_shape(lambda: model.bind(params).init_state(BATCH, 4096))
    if not name.startswith(("attention", "cca")) or "window" in name:
        assert longer == declared, "the state of a recurrent or windowed mixer must not grow with max_len"


FOUR = jnp.tile(jnp.repeat(jnp.asarray([1, 2, 0, 3]), jnp.asarray([9, 11, 3, 9]))[None], (4, 1))


@functools.cache
def unsharded(name):
    """Loss and gradients on one device of what `test_sharded_is_unsharded` computes."""
    model, params = functional(name)

    def loss(params, x):
        y, _ = model.bind(params)(x, None, Context.create(*x.shape[:2], segment_ids=FOUR))
        return jnp.sum(jnp.sin(y) * (FOUR != 0)[..., None])

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, inputs(4, 32))


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((1, 1, 1, 4), "contiguous"),
        ((2, 1, 2, 2), "contiguous"),
        ((1, 2, 1, 4), "zigzag"),
        ((1, 2, 4, 1), "contiguous"),
    ],
    ids=str,
)
def test_sharded_is_unsharded(name, shape, layout, mesh):
    _, params = functional(name)
    x, ids = inputs(4, 32), FOUR

    def in_order(params, x):
        model, _ = functional(name)
        ctx = Context.create(*x.shape[:2], segment_ids=ids).arranged(layout)
        with time_order.use(layout):
            y, _ = model.bind(params)(time_order.arrange_sharded(x, layout), None, ctx)
        return jnp.sum(jnp.sin(time_order.restore_sharded(y, layout)) * (ids != 0)[..., None])

    with jax.set_mesh(mesh(*shape)):
        got = jax.jit(jax.value_and_grad(in_order, argnums=(0, 1)))(params, x)
    close(got, unsharded(name), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(name, platform):
    _, params = functional(name)

    def loss(params, x):
        return jnp.sum(compiled(name)(params, x)[0] ** 2)

    traced = jax.jit(jax.grad(loss)).trace(params, inputs())
    assert "func" in traced.lower(lowering_platforms=(platform,)).as_text()

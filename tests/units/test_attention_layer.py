"""The attention mixer: its cache against one pass over the whole sequence. (More in tests/laws.)"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import Attention, AttentionConfig
from layers.rope import RopeConfig
from layers.types import Context

D_MODEL = 16
CASES = {
    "rope": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True),
    "alibi-window": AttentionConfig(num_heads=4, position="alibi", window=5, qkv_bias=True, out_bias=True),
    "partial-rope-window": AttentionConfig(
        num_heads=2, num_kv_heads=1, rope=RopeConfig(fraction=0.5), window=7
    ),
    "window-of-one": AttentionConfig(num_heads=2, position="none", window=1),
}


@pytest.fixture(autouse=True)
def axes_are_names_only():
    with nnx.use_eager_sharding(False):
        yield


MADE = {}  # compiled once for every test, by config


def make(config):
    """The layer, and ``run(x, state, raw segment ids, id and position before) -> y, state`` under jit."""
    key = repr(config)
    if key not in MADE:
        MADE[key] = build(config)
    return MADE[key]


def build(config):
    layer = Attention(D_MODEL, config, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer, nnx.Param)

    @jax.jit
    def run(x, state, ids, segment, position):
        ctx = Context.create(
            *ids.shape, segment_ids=ids, previous_segment=segment, previous_position=position
        )
        return nnx.merge(graph, params)(x, state, ctx)

    return layer, run


def stream(config, x, ids, pieces, max_len=32):
    """Outputs and last state of ``x`` fed in pieces, with last ids and positions kept by hand."""
    layer, run = make(config)
    state, ys, start = layer.init_state(x.shape[0], max_len), [], 0
    segment, position = np.zeros(x.shape[0], np.int32), np.full(x.shape[0], -1, np.int32)
    for size in pieces:
        part = np.asarray(ids[:, start : start + size])
        y, state = run(x[:, start : start + size], state, part, segment, position)
        segment, position = segment.copy(), position.copy()
        for row, col in zip(*np.nonzero(part)):
            position[row] = position[row] + 1 if part[row, col] == segment[row] else 0
            segment[row] = part[row, col]
        ys.append(y)
        start += size
    return jnp.concatenate(ys, axis=1), state


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(got, want, atol=2e-5, rtol=1e-4):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=atol, rtol=rtol), got, want)


LENGTH = 30
ONE = np.ones((2, LENGTH), np.int32)
PACKED = np.asarray([[0] * 3 + [1] * 14 + [0] * 2 + [2] * 11, [4] * 2 + [5] + [6] * 20 + [0] * 3 + [7] * 4])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ids", [ONE, PACKED], ids=["one segment", "packed"])
def test_every_split_is_one_pass(name, ids):
    layer, run = make(CASES[name])
    x = normal(2, LENGTH, D_MODEL)
    want, none = run(x, None, ids, None, None)
    assert none is None
    want = want * (ids != 0)[..., None]
    # Pieces longer than the window, one token between longer pieces, segments that start inside a piece.
    for pieces in ((LENGTH,), (16, 1, 9, 4), (4, 16, 1, 9), (9,) + (1,) * 21):
        got, state = stream(CASES[name], x, ids, pieces)
        close(got * (ids != 0)[..., None], want)
        close(state["length"], [(row == row[row != 0][-1]).sum() for row in ids])


def test_ring_cache_holds_the_last_window():
    config = CASES["partial-rope-window"]
    layer, _ = make(config)
    assert layer.init_state(2, 100)["k"].shape == (2, 7, 1, 8)
    assert layer.init_state(2, 5)["k"].shape == (2, 5, 1, 8)
    x = normal(2, LENGTH, D_MODEL)
    whole, ones = stream(config, x, ONE, (LENGTH,))[1], stream(config, x, ONE, (1,) * LENGTH)[1]
    close(whole, ones)
    assert layer.cache_room(whole) is None


def test_window_longer_than_the_cache():
    config = dataclasses.replace(CASES["partial-rope-window"], window=40)
    x = normal(2, 12, D_MODEL)
    want = make(config)[1](x, None, ONE[:, :12], None, None)[0]
    close(stream(config, x, ONE, (5, 7), max_len=12)[0], want)


def test_cache_that_is_too_short():
    layer, run = make(CASES["rope"])
    state, x = layer.init_state(2, 8), normal(2, 6, D_MODEL)
    nothing = np.zeros(2, np.int32), np.full(2, -1, np.int32)
    _, state = run(x, state, ONE[:, :6], *nothing)
    np.testing.assert_array_equal(layer.cache_room(state), [2, 2])
    before = np.asarray(state["k"])
    with pytest.raises(ValueError, match="holds 8 tokens, 12 are needed"):
        layer(x, state, Context.create(2, 6))
    _, state = run(x, state, ONE[:, :6], np.ones(2, np.int32), np.full(2, 5, np.int32))
    np.testing.assert_array_equal(layer.cache_room(state), [-4, -4])  # under jit: dropped, and it shows
    np.testing.assert_array_equal(state["k"][:, :6], before[:, :6])


def test_gradient_flows_through_the_cache():
    layer, _ = make(CASES["alibi-window"])
    x, weights = normal(2, 12, D_MODEL), normal(2, 12, D_MODEL, seed=1)

    def whole(x):
        return jnp.sum(layer(x, None, Context.create(2, 12))[0] * weights)

    def pieces(x):
        a, state = layer(x[:, :7], layer.init_state(2, 12), Context.create(2, 7))
        position = jnp.full(2, 6, jnp.int32)
        b, _ = layer(x[:, 7:], state, Context.create(2, 5, previous_position=position))
        return jnp.sum(jnp.concatenate([a, b], axis=1) * weights)

    close(jax.jit(jax.grad(pieces))(x), jax.jit(jax.grad(whole))(x), atol=5e-5)


def test_bfloat16_activations_and_cache():
    config = dataclasses.replace(CASES["rope"], cache_dtype="bfloat16")
    x = normal(2, LENGTH, D_MODEL)
    want = make(CASES["rope"])[1](x, None, ONE, None, None)[0]
    got, state = stream(config, x.astype(jnp.bfloat16), ONE, (16, 1, 9, 4))
    assert got.dtype == jnp.bfloat16 and state["k"].dtype == jnp.bfloat16
    close(got.astype(jnp.float32), want, atol=0.05)


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (1, 2, 1, 4)], ids=str)
def test_prefill_and_decode_under_a_mesh(mesh, shape):
    config = dataclasses.replace(CASES["rope"], num_kv_heads=4)
    x = normal(2, LENGTH, D_MODEL)
    want = stream(config, x, PACKED, (16, 12, 1, 1))
    with jax.set_mesh(mesh(*shape)):
        got = stream(config, x, PACKED, (16, 12, 1, 1))
    real = (PACKED != 0)[..., None]
    close(np.asarray(got[0]) * real, np.asarray(want[0]) * real)
    close(jax.tree.map(np.asarray, got[1]), want[1])


def test_bidirectional_layer_sees_the_future_and_has_no_state():
    layer = Attention(D_MODEL, AttentionConfig(num_heads=2, causal=False), rngs=nnx.Rngs(0))
    x = normal(1, 6, D_MODEL)
    y, state = layer(x, None, Context.create(1, 6))
    changed, _ = layer(x.at[:, -1].add(1.0), None, Context.create(1, 6))
    assert state is None and np.abs(y - changed)[:, 0].max() > 1e-4
    with pytest.raises(ValueError, match="cannot stream"):
        layer.init_state(1, 6)


def test_projections_biases_and_roles():
    layer, _ = make(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True))
    assert layer.q.kernel.shape == (16, 32) and layer.k.kernel.shape == layer.v.kernel.shape == (16, 16)
    assert layer.out.kernel.shape == (32, 16) and layer.q.bias is not None and layer.out.bias is None
    assert layer.k.kernel.get_metadata()["out_sharding"] == ("embed", "kv_heads")
    assert layer.q.kernel.get_metadata()["role"] == "matrix"


def test_flops_count_the_keys_that_are_seen():
    layer, _ = make(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, position="none"))
    projections = 2 * 16 * (32 + 16 + 16 + 32)
    assert layer.flops_per_token(9) == projections + 4 * 32 * 5  # 1 + ... + 9 keys over 9 tokens
    windowed, _ = make(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, position="none", window=2))
    assert windowed.flops_per_token(4) == projections + 4 * 32 * (1 + 2 + 2 + 2) / 4


@pytest.mark.parametrize(
    "config, message",
    [
        (AttentionConfig(num_heads=3), "does not divide d_model=16"),
        (AttentionConfig(num_heads=4, num_kv_heads=3), "num_kv_heads=3"),
        (AttentionConfig(num_heads=2, head_dim=5), "rotates 5 dimensions"),
        (AttentionConfig(num_heads=2, position="learned"), "position='learned' is unknown"),
        (AttentionConfig(num_heads=2, window=0), "window=0"),
        (AttentionConfig(num_heads=2, window=3, causal=False), "needs attention.causal=True"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(config, message):
    with pytest.raises(ValueError, match=message):
        Attention(D_MODEL, config, rngs=nnx.Rngs(0))

"""Core-context-aware attention: the op against its dense reference, the layer against full attention."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.base import Experiment
from layers.attention import Attention, AttentionConfig
from layers.cca import CCAConfig, CoreContextAttention, Piece
from layers.types import Context
from models.config import LMConfig
from objectives.language import check_groups
from pallas_kernels import time_order
from pallas_kernels.attention import Mask, Source, attention
from pallas_kernels.cca import core_context_attention, reference
from runtime import aot
from runtime.mesh import MeshConfig

D_MODEL = 16
TINY = CCAConfig(num_heads=4, num_kv_heads=2, head_dim=8, group_size=4, window=6)
# Documents of every phase: shorter than a group, a group and one token, longer than the window; padding
# before, between and after.
PACKED = jnp.asarray(
    [
        [0] * 2 + [1] * 3 + [2] * 23 + [0] * 3 + [3] * 5 + [4] * 9,
        [5] * 31 + [0] + [6] * 11 + [0] * 2,
    ],
    jnp.int32,
)
LENGTH = PACKED.shape[1]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def qkv(batch=2, length=LENGTH, heads=4, kv_heads=2, width=8):
    kv = (batch, length, kv_heads, width)
    return normal(batch, length, heads, width), normal(*kv, seed=1), normal(*kv, seed=2)


def close(got, want, atol=5e-5, rtol=1e-4):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=atol, rtol=rtol), got, want)


def values_and_gradients(run, args):
    def loss(args):
        y = run(*args)
        return jnp.sum(y * normal(*y.shape, seed=3)), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
    return y, grads


@pytest.mark.parametrize(
    "how",
    [
        {"segment_ids": PACKED},
        {"segment_ids": PACKED, "literal_boundary": True, "pooling": "per_head", "implementation": "xla"},
        {"group_size": 5, "window": 5},
        {"group_size": 1, "window": 1, "segment_ids": PACKED},
        {"segment_ids": PACKED, "implementation": "interpret"},
    ],
    ids=["packed", "literal, per head", "ragged", "groups of one", "interpreted TPU kernels"],
)
def test_equals_the_reference(how):
    run = functools.partial(core_context_attention, **{"group_size": 4, "window": 6, **how})
    got = values_and_gradients(run, qkv())
    want = values_and_gradients(functools.partial(run, implementation="reference"), qkv())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    close(got, want)
    if "segment_ids" in how:
        assert not np.any(got[0][PACKED == 0])


def full_attention(q, k, v, ids=None):
    return attention(q, [Source(k, v, kv_segment_ids=ids, mask=Mask(causal=True))], q_segment_ids=ids)


def test_with_groups_of_one_token_a_core_is_the_token():
    run = jax.jit(lambda *x: (core_context_attention(*x, group_size=1, window=3), full_attention(*x)))
    close(*run(*qkv()))


@pytest.mark.parametrize("packed", [False, True])
def test_short_documents_get_full_attention_to_the_bit(packed):
    ids = jnp.asarray([[1] * 9, [2] * 4 + [3] * 5]) if packed else None

    @jax.jit
    def run(q, k, v):  # a core is seen from token 6 + 4 - 1 on
        y = core_context_attention(q, k, v, group_size=4, window=6, segment_ids=ids)
        return y, full_attention(q, k, v, ids)

    np.testing.assert_array_equal(*run(*qkv(length=9)))


def test_the_first_core_is_seen_after_window_and_group():
    run = jax.jit(
        lambda *x: core_context_attention(*x, group_size=4, window=6) - full_attention(*x),
    )
    difference = np.abs(run(*qkv(length=10)))
    assert difference[:, :9].max() < 1e-6 < 1e-3 < difference[:, 9].max()


def test_memory_is_linear_in_length():
    def peak(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v: core_context_attention(q, k, v, group_size=16, window=64).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = peak(2048), peak(8192)
    assert long < 4.5 * short
    assert long < 8192 * (8192 // 16) * 4 * 2, "not even the scores of cores"


def sharded(mesh, shape, length, ids, how, layout="contiguous"):
    """Values and gradients over a mesh, in the order of time."""

    def run(q, k, v):
        with time_order.use(layout):
            q, k, v = (time_order.arrange_sharded(x, layout) for x in (q, k, v))
            own = None if ids is None else time_order.arrange(ids, layout)
            y = core_context_attention(q, k, v, segment_ids=own, **how)
        return time_order.restore_sharded(y, layout)

    with jax.set_mesh(mesh(*shape)):
        return jax.tree.map(np.asarray, values_and_gradients(run, qkv(length=length)))


@pytest.mark.parametrize(
    "shape, length, layout, packed",
    [
        ((1, 1, 1, 2), 44, "contiguous", True),  # 22 tokens a device: groups of 4 do not fit
        ((1, 1, 1, 4), 32, "zigzag", False),
    ],
    ids=["pieces that groups do not divide", "zigzag, one document"],
)
def test_sharded_is_unsharded(mesh, shape, length, layout, packed):
    how = {"group_size": 4, "window": 6}
    ids = PACKED[:, :length] if packed else None
    got = sharded(mesh, shape, length, ids, how, layout)
    want = values_and_gradients(functools.partial(reference_of, ids=ids, **how), qkv(length=length))
    close(got, want)


def reference_of(q, k, v, ids, group_size, window):
    scale = q.shape[-1] ** -0.5
    return reference.core_context_attention(q, k, v, ids, group_size, window, scale, False, "mean")


def test_zigzag_pieces_that_groups_do_not_divide(mesh):
    with pytest.raises(ValueError, match=r"mesh.sequence=4 devices; with group_size=3 .* multiple of 24"):
        sharded(mesh, (1, 1, 1, 4), 32, None, {"group_size": 3, "window": 6}, "zigzag")


def test_collectives(mesh):
    """Packed rows, four shards of time: one exchange for the pooling, one way around the ring for cores and
    one for tokens."""
    ids = jnp.tile(PACKED[:1, :32], (2, 1))
    with jax.set_mesh(mesh(1, 1, 1, 4)):
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(None, "sequence"))
        x = jax.ShapeDtypeStruct((2, 32, 2, 8), jnp.float32, sharding=sharding)
        run = functools.partial(core_context_attention, group_size=4, window=6, segment_ids=ids)
        text = jax.jit(run).lower(x, x, x).compile().as_text()
    assert not re.findall(r" (all-gather|all-to-all|all-reduce)(-start)?\(", text)
    assert len(re.findall(r" collective-permute(-start)?\(", text)) == 3


def make(config, module=CoreContextAttention):
    with nnx.use_eager_sharding(False):
        return module(D_MODEL, config, rngs=nnx.Rngs(0))


def compiled(layer):
    """``run(x, state, ids, segment and position before) -> y, state``."""
    graph, params = nnx.split(layer, nnx.Param)

    @jax.jit
    def run(x, state=None, ids=None, segment=None, position=None):
        batch, length, _ = x.shape
        before = {"previous_segment": segment, "previous_position": position}
        return nnx.merge(graph, params)(x, state, Context.create(batch, length, segment_ids=ids, **before))

    return run


def test_the_parameters_are_those_of_attention():
    shared = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, qkv_bias=True)
    full, own = make(shared, Attention), make(CCAConfig.like(shared, group_size=4, window=6))
    paths = [[path for path, _ in jax.tree.leaves_with_path(nnx.state(m, nnx.Param))] for m in (full, own)]
    assert paths[0] == paths[1]
    x = normal(2, 9, D_MODEL)
    np.testing.assert_array_equal(compiled(own)(x)[0], compiled(full)(x)[0])


def test_state_is_seven_percent_of_a_full_cache():
    length = 131_072
    config = CCAConfig(num_heads=2, num_kv_heads=1, head_dim=8, group_size=16, window=1024)

    def size(layer):
        state = jax.eval_shape(lambda: layer.init_state(1, length))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim > 1)

    kept = size(make(config)) / size(
        make(AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8), Attention)
    )
    assert kept == (length / 16 + 1024 + 16) / length and round(kept, 3) == 0.07


@jax.jit
def dense(graph, params, x, seen):
    """Output of a layer whose query t sees the keys where ``seen``."""
    layer = nnx.merge(graph, params)
    q, k, v = layer._project(x, Context.create(*x.shape[:2]))
    k, v = (jnp.repeat(t, q.shape[2] // k.shape[2], axis=2) for t in (k, v))
    s = jnp.where(seen, jnp.einsum("bthe,buhe->bhtu", q, k) * layer.scale, -jnp.inf)
    return layer._merge_heads(jnp.einsum("bhtu,buhe->bthe", jax.nn.softmax(s), v))


@pytest.mark.parametrize(
    "sizes, rotation", [((4, 6), "after"), ((4, 6), "before"), ((2, 9), "before")], ids=str
)
def test_the_core_of_equal_tokens_is_one_of_them(sizes, rotation):
    """At the place of the group's last token if rotated after pooling; without positions, of any. Group and
    window are the config's alone: the parameters are the same for all."""
    g, s = sizes
    position = "rope" if rotation == "after" else "none"
    config = dataclasses.replace(TINY, group_size=g, window=s, core_rotation=rotation, position=position)
    layer = make(config)
    x = jnp.repeat(normal(1, 6, D_MODEL), 4, axis=1)
    t, u = np.arange(24)[:, None], np.arange(24)[None]
    first = g * np.maximum(0, (t + 1 - s) // g)
    seen = (u <= t) & ((u >= first) | (u % g == g - 1))
    close(compiled(layer)(x)[0], dense(*nnx.split(layer, nnx.Param), x, seen))


def test_flops_count_what_is_seen():
    layer, length = make(dataclasses.replace(TINY, position="none")), 31
    n_cores = [max(0, (t + 1 - 6) // 4) for t in range(length)]
    seen = np.mean([n + t + 1 - 4 * n for t, n in enumerate(n_cores)])
    projections, pooling = 2 * D_MODEL * 8 * (2 * 4 + 2 * 2), 2 * 8 * (4 + 2 * 2)
    np.testing.assert_allclose(layer.flops_per_token(length), projections + pooling + 4 * 4 * 8 * seen)
    full = make(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), Attention)
    assert layer.flops_per_token(8) == full.flops_per_token(8) + pooling


@pytest.mark.parametrize("max_len, room", [(8, 8), (30, 32)], ids=["a part of the ring", "8 cores"])
def test_room(max_len, room):
    layer = make(TINY)
    state = layer.init_state(1, max_len)
    np.testing.assert_array_equal(layer.cache_room(state), [room])
    piece, full = Piece(*qkv(1, 3), *qkv(1, 3)[1:2]), {**state, "length": jnp.full(1, room - 2)}
    with pytest.raises(ValueError, match=f"holds {room} tokens, {room + 1} are needed"):
        layer._advance(full, full["length"], piece, (), Context.create(1, 3))


def stream(layer, x, ids, sizes):
    """Outputs in pieces, real where ``ids`` are; no piece may end with padding."""
    run, state, ys, start = compiled(layer), layer.init_state(*ids.shape), [], 0
    segment, position = jnp.zeros(2, jnp.int32), jnp.full(2, -1)
    for size in sizes:
        part = slice(start, start + size)
        y, state = run(x[:, part], state, ids[:, part], segment, position)
        ys.append(np.asarray(y))
        start += size
        segment = ids[:, start - 1]
        position = (ids[:, :start] == segment[:, None]).sum(1) - 1
    return np.concatenate(ys, axis=1) * np.asarray(ids != 0)[..., None]


def test_pieces_of_a_variant_are_one_pass():
    """Of the defaults they are by law."""
    config = dataclasses.replace(TINY, literal_boundary=True, pooling="per_head", position="none")
    layer, x, ids = make(config), normal(2, 33, D_MODEL), PACKED[:, 8:41]
    want = compiled(layer)(x, ids=ids)[0]
    close(stream(layer, x, ids, (13, 13) + (1,) * 7), np.asarray(want) * np.asarray(ids != 0)[..., None])


def test_prefill_and_decode_under_a_mesh(mesh):
    layer = make(dataclasses.replace(TINY, core_rotation="after"))
    x, ids = normal(2, 35, D_MODEL), PACKED[:, 7:42]  # the first token decoded completes a group
    want = compiled(layer)(x, ids=ids)[0]
    with jax.set_mesh(mesh(1, 2, 1, 4)):
        got = stream(layer, x, ids, (16, 16, 1, 1, 1))
    close(got, np.asarray(want) * np.asarray(ids != 0)[..., None])


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.parametrize("chip", ["v5e"])
def test_compiles(chip):
    """Forward and backward of packed rows with grouped heads at the paper's sizes."""

    def loss(q, k, v, ids):
        y = core_context_attention(q, k, v, group_size=16, window=1024, segment_ids=ids)
        return jnp.sum(y.astype(jnp.float32))

    shape = jax.ShapeDtypeStruct
    q, k = (shape((1, 4096, heads, 128), jnp.bfloat16) for heads in (4, 2))
    text = aot.compile_for(chip, jax.grad(loss, (0, 1, 2)), q, k, k, shape((1, 4096), jnp.int32)).as_text()
    for kernel in ("attention_forward", "attention_backward_q", "attention_backward_kv"):
        assert kernel in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group_size": 8}, "cca.group_size=8 is larger than cca.window=6"),
        ({"window": 0}, "cca.window=0 and cca.group_size=4 must be at least 1"),
        ({"group_size": 0}, "cca.group_size=0 must be at least 1"),
        ({"causal": False}, "cca.causal=False"),
        ({"position": "alibi"}, "cca.position='alibi'"),
        ({"pooling": "max"}, "cca.pooling='max' is unknown"),
        ({"core_rotation": "twice"}, "cca.core_rotation='twice'"),
        ({"core_rotation": "after", "position": "none"}, "'after' needs 'rope'"),
        ({"num_kv_heads": 3}, "cca.num_kv_heads=3"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_configs_that_cannot_work(change, message):
    with pytest.raises(ValueError, match=message):
        make(dataclasses.replace(TINY, **change))


def test_lengths_that_groups_on_a_mesh_do_not_divide(mesh):
    config = Experiment(model=LMConfig(pattern="c", cca=TINY), mesh=MeshConfig(sequence_layout="zigzag"))
    check_groups(config, mesh(1, 1, 1, 4), {"": 64, "eval_": 32})
    with pytest.raises(ValueError, match=r"task.eval_seq_len=40 must be a multiple of 32 .* 64 would work"):
        check_groups(config, mesh(1, 1, 1, 4), {"": 64, "eval_": 40})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"pooling": "max"}, "pooling='max' does not exist"),
        ({"k": normal(2, 12, 3, 8), "v": normal(2, 12, 3, 8)}, "K that divides 4"),
        ({"implementation": "triton"}, "does not exist"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_calls_that_cannot_work(change, message):
    q, k, v = qkv(length=12)
    with pytest.raises(ValueError, match=message):
        core_context_attention(q, **{"k": k, "v": v, "group_size": 4, "window": 6, **change})

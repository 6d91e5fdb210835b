"""The attention op: blockwise and ring against the dense reference, and the reference against numpy."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import MASKED, Alibi, Mask, Source, attention, blockwise, cudnn, reference

SLOPES = jnp.asarray([0.5, 0.25, 0.125, 0.0625])
CAUSAL = Mask(causal=True)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32)


def qkv(length, keys, batch=2, heads=4, kv_heads=2, width=8):
    kv = (batch, keys, kv_heads, width)
    return normal(batch, length, heads, width), normal(*kv, seed=1), normal(*kv, seed=2)


def close(got, want, atol=2e-5, rtol=1e-4):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=atol, rtol=rtol), got, want)


def values_and_gradients(run, q, sources, segments=None, bias=None):
    """Output, log-sum-exp, and the gradients of a function of both with respect to q and every k and v."""

    def loss(q, kv):
        own = [Source(k, v, *rest) for (k, v), rest in zip(kv, tokens)]
        out, lse = run(q, own, segments, 0.3, bias)
        seen = jnp.where(lse > MASKED / 2, lse, 0.0)
        return jnp.sum(out * normal(*out.shape, seed=3)) + jnp.sum(jnp.sin(seen)), (out, lse)

    names = ("q_positions", "kv_positions", "kv_segment_ids", "kv_length", "mask", "kv_window_positions")
    tokens = [[getattr(s, name) for name in names] for s in sources]
    kv = [(s.k, s.v) for s in sources]
    (_, values), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(q, kv)
    return values, grads


def agree(q, sources, segments=None, bias=None, block=16):
    run = functools.partial(blockwise.attention, block=block)
    got = values_and_gradients(run, q, sources, segments, bias)
    want = values_and_gradients(reference.attention, q, sources, segments, bias)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    close(got, want, atol=5e-5)
    return got


def ids(length, *runs):
    """One row of segment ids a run list: ((id, count), ...), filled up with padding."""
    rows = [np.concatenate([np.full(n, i) for i, n in run]) for run in runs]
    return jnp.asarray(np.stack([np.pad(r, (0, length - r.size)) for r in rows]), jnp.int32)


PACKED = ids(45, ((1, 9), (2, 20), (3, 10)), ((0, 17), (1, 28)))


def test_reference_equals_loops():
    q, k, v = qkv(7, 7)
    segments = ids(7, ((1, 3), (2, 4)), ((0, 2), (1, 5)))
    out, lse = reference.attention(
        q, [Source(k, v, kv_segment_ids=segments, mask=Mask(True, 3))], segments, 0.3, Alibi(SLOPES)
    )
    for b, h, i in np.ndindex(2, 4, 7):
        seen = [j for j in range(max(0, i - 2), i + 1) if segments[b, i] and segments[b, i] == segments[b, j]]
        if not seen:
            assert np.all(out[b, i, h] == 0) and lse[b, h, i] == MASKED
            continue
        logits = np.array([0.3 * q[b, i, h] @ k[b, j, h // 2] - SLOPES[h] * (i - j) for j in seen])
        weights = np.exp(logits - logits.max())
        expected = weights @ np.stack([v[b, j, h // 2] for j in seen]) / weights.sum()
        close(out[b, i, h], expected)
        close(lse[b, h, i], np.log(weights.sum()) + logits.max())


@pytest.mark.parametrize("block", [8, 64], ids=["blockwise", "one tile"])
@pytest.mark.parametrize(
    "mask, packed, bias",
    [
        (Mask(), False, False),
        (CAUSAL, False, True),
        (CAUSAL, True, False),
        (Mask(causal=True, window=11), True, True),
        (Mask(window=5), False, False),
    ],
    ids=["full", "causal-alibi", "packed", "window-packed-alibi", "window"],
)
def test_blocks_equal_the_reference(mask, packed, bias, block):
    q, k, v = qkv(45, 45)
    segments = PACKED if packed else None
    source = Source(k, v, kv_segment_ids=segments, mask=mask)
    agree(q, [source], segments, Alibi(SLOPES) if bias else None, block)


@pytest.mark.parametrize("block", [8, 64], ids=["blockwise", "one tile"])
def test_groups_of_keys_leave_the_window_as_one(block):
    q, k, v = qkv(45, 45)
    starts = jnp.tile(jnp.arange(45) // 4 * 4, (2, 1))
    source = Source(k, v, mask=Mask(causal=True, window=11), kv_window_positions=starts)
    (out, _), _ = agree(q, [source], block=block)
    # Query 20 sees keys 12 to 20: their groups start at 12, 16, 20, and 20 - 8 is not below 11.
    own = reference.attention(q[:, 20:21], [Source(k[:, 12:21], v[:, 12:21])], None, 0.3, None)[0]
    close(out[:, 20], own[:, 0])
    agree(q, [dataclasses.replace(source, kv_segment_ids=PACKED)], PACKED, block=block)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (6, 3)])
def test_grouped_heads(heads, kv_heads):
    q, k, v = qkv(20, 20, heads=heads, kv_heads=kv_heads)
    agree(q, [Source(k, v, mask=CAUSAL)])


@pytest.mark.parametrize("length, keys, block", [(1, 50, 4), (5, 50, 4), (1, 50, 64), (50, 3, 8), (1, 1, 8)])
def test_cached_keys(length, keys, block):
    q, k, v = qkv(length, keys)
    start = jnp.asarray([[20], [3]])
    positions, held = start + jnp.arange(length), jnp.minimum(start[:, 0] + 1, keys)
    kv_positions = jnp.broadcast_to(jnp.arange(keys), (2, keys))
    source = Source(k, v, positions, kv_positions, kv_length=held, mask=Mask(causal=True, window=9))
    agree(q, [source], block=block)


def test_several_sources_are_one_softmax():
    q, k, v = qkv(20, 20)
    _, old_k, old_v = qkv(20, 33, batch=2)
    segments = ids(20, ((1, 8), (2, 12)), ((1, 15),))
    memory = Source(old_k[:, :5], old_v[:, :5])  # seen by every query that is not padding
    cache = Source(
        old_k,
        old_v,
        jnp.arange(20)[None].repeat(2, 0) + 33,
        jnp.arange(33)[None].repeat(2, 0),
        jnp.ones((2, 33), jnp.int32),
        jnp.asarray([30, 0]),
        Mask(window=25),
    )
    piece = Source(k, v, kv_segment_ids=segments, mask=CAUSAL)
    (out, lse), _ = agree(q, [memory, cache, piece], segments, Alibi(SLOPES), block=8)
    assert np.all(out[1, 15:] == 0) and np.all(lse[1, :, 15:] == MASKED)


def test_queries_that_see_nothing_have_zero_output_and_gradient():
    q, k, v = qkv(20, 20)
    segments = jnp.zeros((2, 20), jnp.int32).at[0, 4:9].set(1)
    for block in (8, 64):
        (out, lse), (dq, (dkv,)) = agree(q, [Source(k, v, kv_segment_ids=segments)], segments, None, block)
        assert np.all(out[1] == 0) and np.all(lse[1] == MASKED) and np.all(dq[1] == 0)
        assert all(np.all(g[1] == 0) for g in dkv)


def test_bfloat16_is_close_and_statistics_are_float32():
    q, k, v = qkv(45, 45)
    for block in (16, 64):
        (want, _), want_grads = values_and_gradients(reference.attention, q, [Source(k, v, mask=CAUSAL)])
        run = functools.partial(blockwise.attention, block=block)
        half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
        (got, lse), grads = values_and_gradients(run, half[0], [Source(*half[1:], mask=CAUSAL)])
        assert got.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
        close(got.astype(jnp.float32), want, atol=0.03, rtol=0.03)
        close(jax.tree.map(lambda x: x.astype(jnp.float32), grads), want_grads, atol=0.06, rtol=0.06)


def test_memory_is_linear_in_length():
    def peak(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        loss = lambda q, k, v: attention(q, [Source(k, v, mask=CAUSAL)]).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = peak(2048), peak(8192)
    assert long < 4.5 * short
    assert long < 8192 * 8192 * 4 // 8


def test_blocks_that_the_mask_rules_out_are_not_visited():
    # Keys there are NaN: visiting them would show, since 0 * NaN is NaN.
    q, k, v = qkv(64, 64, batch=1)
    for mask, dead in ((CAUSAL, slice(32, 64)), (Mask(causal=True, window=5), slice(0, 24))):
        queries = slice(0, 32) if mask == CAUSAL else slice(32, 64)
        poisoned = [
            Source(x.at[:, dead].set(jnp.nan), y.at[:, dead].set(jnp.nan), mask=mask) for x, y in [(k, v)]
        ]
        out, _ = blockwise.attention(q, poisoned, None, 0.3, None, block=8)
        assert np.isfinite(out[:, queries]).all()


MESHES = [(1, 1, 1, 4), (1, 1, 2, 2), (2, 1, 2, 2), (1, 1, 4, 2)]
ROWS = ids(24, ((1, 5), (2, 16)), ((0, 7), (1, 17)), ((1, 12), (2, 12)), ((3, 24),))


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("case", ["packed", "window-alibi", "window-groups", "full", "positions-and-cache"])
def test_sharded_equals_unsharded(mesh, shape, case):
    q, k, v = qkv(24, 24, batch=4)
    segments, bias, extra = None, None, []
    source = Source(k, v)
    if case == "packed":
        segments = ROWS
        source = Source(k, v, kv_segment_ids=ROWS, mask=CAUSAL)
    elif case == "window-alibi":
        source, bias = Source(k, v, mask=Mask(causal=True, window=7)), Alibi(SLOPES)
    elif case == "window-groups":
        starts = jnp.tile(jnp.arange(24) // 3 * 3, (4, 1))
        source = Source(k, v, mask=Mask(causal=True, window=7), kv_window_positions=starts)
    elif case == "positions-and-cache":
        positions = jnp.arange(24)[None].repeat(4, 0) * 2 + 10
        source = Source(k, v, positions, positions, mask=CAUSAL)
        _, old_k, old_v = qkv(24, 10, batch=4)
        extra = [Source(old_k, old_v, positions, kv_length=jnp.asarray([0, 3, 10, 1]), mask=Mask(window=30))]

    def run(q, sources, segments, scale, bias, **options):
        return attention(
            q, sources, q_segment_ids=segments, softmax_scale=scale, bias=bias, return_lse=True, **options
        )

    want = values_and_gradients(reference.attention, q, [source, *extra], segments, bias)
    with jax.set_mesh(mesh(*shape)):
        got = values_and_gradients(run, q, [source, *extra], segments, bias)
    close(jax.tree.map(np.asarray, got), want, atol=5e-5)


def test_decoding_under_a_mesh(mesh):
    q, k, v = qkv(1, 16)
    sources = [Source(k, v, kv_length=jnp.asarray([5, 16]))]
    want = reference.attention(q, sources, None, 0.3, None)[0]
    with jax.set_mesh(mesh(1, 2, 2, 2)):
        got = jax.jit(lambda q, s: attention(q, s, softmax_scale=0.3))(q, sources)
    close(np.asarray(got), want)


@pytest.mark.parametrize("packed", [False, True])
def test_ring_collectives(mesh, packed):
    """One rotation in the loop for keys with values; backward one more for their gradients and one home.

    Segment ids do not travel.
    """
    segments = ROWS if packed else None
    with jax.set_mesh(mesh(1, 1, 1, 4)):
        sharding = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(None, "sequence"))
        x = jax.ShapeDtypeStruct((4, 24, 2, 8), jnp.float32, sharding=sharding)

        def loss(q, k, v):
            source = Source(k, v, kv_segment_ids=segments, mask=CAUSAL)
            return attention(q, [source], q_segment_ids=segments).sum()

        counts = []
        for f in (loss, jax.grad(loss, (0, 1, 2))):
            text = jax.jit(f).lower(x, x, x).compile().as_text()
            assert not re.findall(r" (all-gather|all-to-all)(-start)?\(", text)
            counts.append(len(re.findall(r" collective-permute(-start)?\(", text)))
    assert counts == [1, 4]


def test_tensor_axis_that_cannot_split_the_heads(mesh):
    q, k, v = qkv(8, 8, heads=6, kv_heads=3)
    with jax.set_mesh(mesh(1, 1, 2, 1)), pytest.raises(ValueError, match="tensor axis of 2 devices"):
        attention(q, [Source(k, v)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sources": []}, "no key sources"),
        ({"k": normal(2, 8, 3, 8), "v": normal(2, 8, 3, 8)}, "3 key heads do not divide 4"),
        ({"k": normal(2, 8, 2, 4), "v": normal(2, 8, 2, 4)}, r"both must be \[2, Lk, K, 8\]"),
        ({"kv_segment_ids": jnp.ones((2, 8), jnp.int32)}, "without q_segment_ids"),
        ({"q_positions": jnp.ones((2, 9), jnp.int32)}, r"q_positions is \(2, 9\)"),
        ({"bias": Alibi(jnp.ones(3))}, "one a head"),
        ({"implementation": "cudnn"}, "no GPU on this machine"),
        ({"implementation": "triton"}, "does not exist"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(change, message):
    q, k, v = qkv(8, 8)
    call = {name: change.pop(name) for name in ("sources", "bias", "implementation") if name in change}
    call.setdefault("sources", [Source(**{"k": k, "v": v, **change})])
    with pytest.raises(ValueError, match=message):
        attention(q, **call)


def test_window_must_hold_the_query():
    with pytest.raises(ValueError, match="window=0"):
        Mask(window=0)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_cudnn_equals_the_reference():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(128, 128, width=64))
    sources = [Source(k, v, mask=CAUSAL)]
    assert cudnn.unsupported(q, sources, None, None, False) is None
    want = reference.attention(q, sources, None, 0.125, None)[0]
    got = attention(q, sources, implementation="cudnn")
    close(got.astype(jnp.float32), want.astype(jnp.float32), atol=0.03, rtol=0.03)

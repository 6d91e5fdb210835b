"""Flash attention on TPU: the interpreted kernels against the dense reference; compiled for real chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import MASKED, Alibi, Mask, Source, attention, blockwise, reference
from runtime import aot
from tests.races import CHECKED, assert_no_races

CAUSAL = Mask(causal=True)
BLOCK = 128
FIELDS = ("q_positions", "kv_positions", "kv_segment_ids", "kv_length", "mask", "kv_window_positions")


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def source(keys, mask=CAUSAL, seed=1, dtype=jnp.float32, **tokens):
    kv = (2, keys, 2, 16)
    return Source(
        normal(*kv, seed=seed, dtype=dtype), normal(*kv, seed=seed + 1, dtype=dtype), **tokens, mask=mask
    )


def ids(length):
    """Segments shorter than a block and longer; padding before, between and after; a row of padding."""
    rows = np.zeros((2, length), np.int32)
    rows[0, 3:20], rows[0, 20:21], rows[0, 22:150], rows[0, 150:-5] = 1, 2, 3, 70000
    return jnp.asarray(rows)


ALIBI = Alibi(jnp.asarray([0.5, 0.25, 0.125, 0.0625]))
LATE = jnp.tile(jnp.arange(260, 300, dtype=jnp.int32), (2, 1))
CASES = {  # queries, sources, segment ids of the queries, bias
    "causal, ragged": (300, [source(300)], None, None),
    "full, ALiBi, part of a cache": (
        40,
        [source(300, Mask(), kv_length=jnp.asarray([293, 150]))],
        None,
        ALIBI,
    ),
    "window over several blocks": (400, [source(400, Mask(causal=True, window=150))], None, None),
    "groups of keys leave a window as one": (
        300,
        [
            source(
                300,
                Mask(causal=True, window=150),
                kv_segment_ids=ids(300),
                kv_window_positions=jnp.tile(jnp.arange(300, dtype=jnp.int32) // 16 * 16, (2, 1)),
            )
        ],
        ids(300),
        None,
    ),
    "packed": (300, [source(300, kv_segment_ids=ids(300))], ids(300), None),
    "two sources, one softmax": (
        40,
        [source(40), source(300, q_positions=LATE, kv_positions=jnp.tile(jnp.arange(300), (2, 1)), seed=5)],
        None,
        None,
    ),
    "a few": (9, [source(9)], None, None),
}


def values_and_gradients(run, q, sources, segments, bias):
    """Output, log-sum-exp, and gradients of a function of both with respect to q and every k and v."""

    def loss(q, kv):
        own = [Source(k, v, *(getattr(s, name) for name in FIELDS)) for (k, v), s in zip(kv, sources)]
        out, lse = run(q, own, segments, 0.3, bias)
        seen = jnp.where(lse > MASKED / 2, lse, 0.0)
        weighted = out.astype(jnp.float32) * normal(*out.shape, seed=3)
        return jnp.sum(weighted) + jnp.sum(jnp.sin(seen)), (out, lse)

    kv = [(s.k, s.v) for s in sources]
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(q, kv)


def interpreted(*args):
    return blockwise.attention(*args, block=BLOCK, implementation="interpret")


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    length, *given = CASES[case]
    q = normal(2, length, 4, 16)
    got, want = (values_and_gradients(run, q, *given) for run in (interpreted, reference.attention))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=5e-5, rtol=1e-4), got, want)


def test_bfloat16_is_close_to_float32():
    q = normal(2, 300, 4, 16)
    want = values_and_gradients(reference.attention, q, [source(300)], None, None)
    low = values_and_gradients(
        interpreted, q.astype(jnp.bfloat16), [source(300, dtype=jnp.bfloat16)], None, None
    )
    for g, w in zip(jax.tree.leaves(low), jax.tree.leaves(want)):
        assert np.abs(g.astype(np.float32) - w).max() <= 2e-2 * np.abs(w).max()


def test_no_races_and_no_memory_that_nobody_wrote():
    q, k, v = normal(1, 140, 2, 16), normal(1, 140, 1, 16, seed=1), normal(1, 140, 1, 16, seed=2)
    spec = blockwise.Spec(CAUSAL, 0.3, aligned=True, out_dtype=jnp.float32, block=BLOCK)
    tokens = blockwise.tokens_of(Source(k, v, mask=CAUSAL), 140, None, True)
    forward, backward = (
        functools.partial(run, spec, interpret=CHECKED)
        for run in (blockwise.tpu.forward, blockwise.tpu.backward)
    )
    out, lse = assert_no_races(forward, q, k, v, *tokens, None)
    delta = blockwise.row_delta(out, out, lse)
    gradients = assert_no_races(backward, q, k, v, *tokens, None, lse, out, delta)
    want_out, want_lse = blockwise.xla.forward(spec, q, k, v, *tokens, None)
    np.testing.assert_allclose(out, want_out, atol=1e-5)
    want = blockwise.xla.backward(spec, q, k, v, *tokens, None, want_lse, want_out, delta)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4), gradients, want)


@pytest.mark.aot
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_compiles(chip):
    """Forward and backward of packed rows, with a window and grouped heads."""

    def loss(x, weights, segment_ids):
        q, k, v = (jnp.einsum("bld,dhe->blhe", x, w) for w in weights)
        mask = Mask(causal=True, window=1024)
        out = attention(q, [Source(k, v, kv_segment_ids=segment_ids, mask=mask)], q_segment_ids=segment_ids)
        return jnp.sum(out.astype(jnp.float32))

    shape = jax.ShapeDtypeStruct
    x, row = shape((1, 2048, 256), jnp.bfloat16), shape((1, 2048), jnp.int32)
    weights = [shape((256, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
    text = aot.compile_for(chip, jax.grad(loss, (0, 1)), x, weights, row).as_text()
    for kernel in ("attention_forward", "attention_backward_q", "attention_backward_kv"):
        assert kernel in text


def test_refusals():
    q, own = normal(2, 9, 4, 16), source(9)
    with pytest.raises(
        ValueError, match=r"sources\[0\]: q, k and v are bfloat16, float32 and float32; cast all"
    ):
        attention(q.astype(jnp.bfloat16), [own], implementation="interpret")
    with pytest.raises(ValueError, match="'pallas_tpu' runs on tpu only"):
        jax.jit(lambda q: attention(q, [own], implementation="pallas_tpu"))(q)

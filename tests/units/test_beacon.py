"""Activation Beacon: who sees whom, streaming, packed documents, the backbone untouched, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.beacon import BeaconAttention
from layers.beacon_ratios import (
    BeaconConfig,
    Ratios,
)
from layers.beacon_slots import lay_out, room
from layers.mlp import MLPConfig
from layers.types import Context
from models.beacon import BeaconLM
from models.beacon_config import BeaconLMConfig
from models.functional import Functional

W = 8


def config(pattern="*", **beacon):
    return BeaconLMConfig(
        vocab_size=31,
        vocab_multiple=1,
        d_model=16,
        pattern=pattern,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
        mlp=MLPConfig(hidden=16),
        beacon=BeaconConfig(**{"window": W, "ratios": (2, 4), "eval_ratios": (4, 2), **beacon}),
    )


def build(settings):
    settings.validate()
    model = Functional.create(lambda rngs: BeaconLM(settings, rngs=rngs))
    params = model.init(jax.random.key(0))
    noise = lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape)  # noqa: E731
    return model, jax.tree.map(noise, params)  # so that beacons differ from raw tokens


def compiled(model, **static):
    return jax.jit(
        lambda params, tokens, state, ids: model.bind(params)(tokens, state, segment_ids=ids, **static)[:2]
    )


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 31, shape), jnp.int32)


# Two rows of packed documents, with padding before, between and after.
LENGTHS = [[(1, 19), (0, 2), (2, 9), (4, 3), (0, 1)], [(0, 3), (7, 26), (0, 1), (3, 4)]]
IDS = jnp.asarray([[i for i, n in row for _ in range(n)] for row in LENGTHS], jnp.int32)


def expected(c, ratios, ids, last):
    """Slots (segment, g, j or i, is beacon) in the order of the array, and a matrix of who sees whom."""
    raw, beacons, count = [], [], {}
    for i in ids:
        n = count[i] = count.get(i, -1) + 1
        raw.append((i, n // c.window, n % c.window, False))
    for i, g, j, _ in raw:
        ratio = ratios[g % len(ratios)]
        over = g == count[i] // c.window and not last
        if i and not over and c.variant != "full-coverage" and (j + 1) % ratio == 0:
            beacons.append((i, g, j // ratio, True))
        if i and not over and c.variant == "full-coverage" and j == c.window - 1:
            beacons += [(i, g, k, True) for k in range(c.window // ratio)]

    def sees(q, k):
        (i, g, a, q_beacon), (i2, g2, b, k_beacon) = q, k
        ratio = ratios[g % len(ratios)]
        if i == 0 or i != i2:
            return False
        if g2 < g:
            kept = k_beacon or (g2 == 0 and b < c.sinks)
            return kept and (c.attend_previous or not q_beacon)
        if g2 > g:
            return False
        if c.variant == "interleaved":
            when = lambda n, beacon: ((n + 1) * ratio - 1, 1) if beacon else (n, 0)  # noqa: E731
            return when(b, k_beacon) <= when(a, q_beacon)
        if not q_beacon or k_beacon:
            return q_beacon == k_beacon and (a == b if q_beacon else b <= a)
        first = a * ratio if c.variant == "segmentation" else 0
        return first <= b < (c.window if c.variant == "full-coverage" else (a + 1) * ratio)

    slots = raw + beacons
    return slots, np.array([[sees(q, k) for k in slots] for q in slots])


@pytest.mark.parametrize(
    ("variant", "more", "last"),
    [
        ("interleaved", {"sinks": 2}, True),
        ("interleaved", {}, False),
        ("step-expansion", {"attend_previous": False}, False),
        ("segmentation", {"own_out": True}, False),
        ("full-coverage", {"sinks": 1}, False),
    ],
)
def test_who_sees_whom(variant, more, last):
    c = BeaconConfig(window=W, ratios=(4, 2), variant=variant, **more)
    attention = AttentionConfig(num_heads=1, head_dim=8, implementation="reference")
    layer = BeaconAttention(8, attention, condensing=c, rngs=nnx.Rngs(0))
    ratios = Ratios(jnp.asarray([[4, 2]]), W, 2)

    @jax.jit
    def dependence(x, ids):
        """d (sum over features of slot q of row b) / d (slot k of row b), [q, b, k]."""
        ctx = lay_out(c, ratios, Context.create(*ids.shape, segment_ids=ids), None, last=last)
        jacobian = jax.jacrev(lambda x: layer(x, None, ctx)[0].sum((0, 2)))(x)
        return jnp.abs(jacobian).sum(-1) > 0, ctx.segment_ids

    length = IDS.shape[1]
    x = jax.random.normal(jax.random.key(1), (2, length + room(c, 2, length, aligned=True, last=last), 8))
    found, segments = dependence(x, IDS)
    for row, ids in enumerate(IDS):
        slots, want = expected(c, (4, 2), ids.tolist(), last)
        there = np.flatnonzero(np.r_[np.ones(len(ids), bool), segments[row, len(ids) :] != 0])
        assert len(there) == len(slots)
        np.testing.assert_array_equal(found[np.ix_(there, [row], there)][:, 0], want)
        assert not found[there, row][:, np.setdiff1d(np.arange(x.shape[1]), there)].any()


STREAMED = {
    "interleaved": config("*-*", sinks=1),
    "segmentation": config(variant="segmentation"),
    "step-expansion": config(variant="step-expansion", attend_previous=False, sinks=2),
    "full-coverage": config(variant="full-coverage", own_out=True),
}


@pytest.mark.parametrize("variant", STREAMED)
def test_any_split_is_one_pass_and_packed_documents_are_alone(variant):
    model, params = build(STREAMED[variant])
    ids, words = IDS, tokens(*IDS.shape)
    call = compiled(model)
    whole, none = call(params, words, None, ids)
    assert none is None
    rows = [(r, i) for r in range(2) for i, n in LENGTHS[r] if i]
    alone = jnp.zeros((len(rows), 26), jnp.int32)
    for n, (r, i) in enumerate(rows):
        text = words[r][ids[r] == i]
        alone = alone.at[n, : len(text)].set(text)
    lengths = jnp.asarray([int((ids[r] == i).sum()) for r, i in rows])
    own, _ = call(params, alone, None, (jnp.arange(26) < lengths[:, None]).astype(jnp.int32))
    for n, (r, i) in enumerate(rows):
        np.testing.assert_allclose(whole[r][ids[r] == i], own[n, : lengths[n]], atol=2e-5)
    sizes = (5, 1) if variant == "interleaved" else (5,)
    for size in sizes:
        state, parts = model.bind(params).init_state(2, ids.shape[1]), []
        padded = -ids.shape[1] % size
        for begin in range(0, ids.shape[1], size):
            cut = [jnp.pad(a, ((0, 0), (0, padded)))[:, begin : begin + size] for a in (words, ids)]
            part, state = call(params, cut[0], state, cut[1])
            parts.append(part)
        found = jnp.concatenate(parts, axis=1)[:, : ids.shape[1]]
        np.testing.assert_allclose(found[ids != 0], whole[ids != 0], atol=2e-5)

"""Activation Beacon: who sees whom, streaming, packed documents, the backbone untouched, what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from configs.beacon import BeaconExperiment
from layers.attention import AttentionConfig
from layers.beacon import BeaconAttention, refuse_overflow
from layers.beacon_ratios import (
    BeaconConfig,
    Ratios,
    beacons_of,
    evaluation_ratios,
    evaluation_table,
    training_ratios,
)
from layers.beacon_slots import NOWHERE, lay_out, room
from layers.mlp import MLPConfig
from layers.types import Context
from models.beacon import BeaconLM, copy_backbone
from models.beacon_config import BeaconLMConfig
from models.config import LMConfig
from models.functional import Functional
from models.lm import LM

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
    "interleaved": config("*-", sinks=1),
    "segmentation": config(variant="segmentation", attend_previous=False, own_out=True, sinks=2),
    "full-coverage": config(variant="full-coverage"),
}


@pytest.mark.parametrize("variant", STREAMED)
def test_any_split_is_one_pass_and_packed_documents_are_alone(variant):
    model, params = build(STREAMED[variant])
    words, ids = np.array(tokens(*IDS.shape)), np.array(IDS)
    packed = [(row, i) for row in range(len(ids)) for i, _ in LENGTHS[row] if i]
    for row, i in packed:  # below the packed rows, each document in a row of its own
        text = words[row][ids[row] == i]
        own = np.zeros((2, ids.shape[1]), np.int32)
        own[0, : len(text)], own[1, : len(text)] = text, 1
        words, ids = np.r_[words, own[:1]], np.r_[ids, own[1:]]
    call = compiled(model)
    whole, none = call(params, words, None, ids)
    assert none is None
    for number, (row, i) in enumerate(packed, len(IDS)):
        np.testing.assert_allclose(whole[row][ids[row] == i], whole[number][ids[number] == 1], atol=2e-5)
    for size in (5, 1) if variant == "interleaved" else (5,):
        state, parts = model.bind(params).init_state(*ids.shape), []
        padded = [np.pad(a, ((0, 0), (0, -ids.shape[1] % size))) for a in (words, ids)]
        for begin in range(0, ids.shape[1], size):
            cut = [a[:, begin : begin + size] for a in padded]
            part, state = call(params, cut[0], state, cut[1])
            parts.append(part)
        found = jnp.concatenate(parts, axis=1)[:, : ids.shape[1]]
        np.testing.assert_allclose(found[ids != 0], whole[ids != 0], atol=2e-5)


def test_without_beacons_it_is_the_backbone_to_the_bit():
    settings = config("*-*", eval_ratios=(0,))
    plain = {f.name: getattr(settings, f.name) for f in dataclasses.fields(LMConfig)}
    lm = Functional.create(lambda rngs: LM(LMConfig(**plain), rngs=rngs))
    model, _ = build(settings)
    params, own = lm.init(jax.random.key(3)), model.init(jax.random.key(3))
    for path, value in flatten_dict(params).items():  # beacons take nothing from the stream of random numbers
        np.testing.assert_array_equal(flatten_dict(own)[path], value)
    words = tokens(2, W)
    want, state = compiled(lm)(params, words, lm.bind(params).init_state(2, W), None)
    found, own_state = compiled(model)(own, words, model.bind(own).init_state(2, W), None)
    np.testing.assert_array_equal(found, want)
    jax.tree.map(np.testing.assert_array_equal, own_state, state)
    # A row of one window has no beacons in training, whatever the ratios.
    found, _ = compiled(model, deterministic=False, key=jax.random.key(0))(own, words, None, None)
    np.testing.assert_array_equal(found, compiled(lm)(params, words, None, None)[0])


def test_copies_of_the_backbone():
    settings = config("(*-)2", own_out=True)
    model, params = build(settings)
    made = copy_backbone(settings, params)
    mixer = made["backbone"]["runs"][0]["layers"][0]["mixer"]
    assert set(mixer["beacon"]) == {"q", "k", "v", "out"}
    for name, projection in mixer["beacon"].items():
        np.testing.assert_array_equal(projection["kernel"], mixer[name]["kernel"])
    np.testing.assert_array_equal(made["beacon_embed"], params["embed"]["table"][30])
    assert jax.tree.structure(made) == jax.tree.structure(model.shapes)


def test_ratios_of_windows():
    adaptive = BeaconConfig(window=16, eval_ratios=(2, 4, 8), eval_mix="adapt-10", positions=40)
    # A window of 16, and 24 positions for memories: alpha * 24 + 16 tokens, 10 of them to come.
    assert [int(evaluation_table(adaptive, n)[0]) for n in (54, 55, 102, 103, 500)] == [2, 4, 4, 8, 8]
    cyclic = BeaconConfig(window=16, ratios=(2, 8, 4), mix="sequence", eval_ratios=())
    ratios, windows = evaluation_ratios(cyclic, 100), jnp.arange(7)[None]
    assert ratios.of(windows)[0].tolist() == [2, 8, 4, 2, 8, 4, 2]
    assert ratios.before(windows)[0].tolist() == [0, 8, 10, 14, 22, 24, 28]
    assert [beacons_of(cyclic, n) for n in (15, 16, 17, 40, 112)] == [7, 8, 8, 12, 36]
    for mix, shape in (("step-random", (1, 50)), ("instance-random", (20, 1))):
        drawn = BeaconConfig(window=2, ratios=(1, 2), mix=mix)
        table = training_ratios(drawn, 20, 100, jax.random.key(0)).table
        assert table.shape == shape and set(np.unique(table)) == {1, 2}
        with pytest.raises(ValueError, match="needs a PRNG key"):
            training_ratios(drawn, 20, 100, None)


def test_caches_are_condensed_and_a_full_one_is_refused():
    model, params = build(config("*-*", sinks=1, eval_ratios=(4,)))
    condensed, full = model.bind(params).kv_bytes(1024)
    a_token = 2 * 2 * 8 * 4  # layers, keys and values, head dim, bytes
    assert (condensed, full) == (a_token * (1 + 256 + 8 + 2), a_token * 1024)
    lm = model.bind(params)
    refuse_overflow(jnp.array([[4, NOWHERE, 3]]), 5)
    with pytest.raises(ValueError, match="holds 4 sinks and beacons, 5 are needed; raise max_len"):
        refuse_overflow(jnp.array([[4, NOWHERE, 3]]), 4)
    with pytest.raises(ValueError, match="at least one token"):
        lm(tokens(1, 0))
    with pytest.raises(ValueError, match="carries no state"):
        lm(tokens(1, 4), lm.init_state(1, 4), deterministic=False)


def test_memory_of_a_training_pass_grows_no_faster_than_its_length():
    model, params = build(config(window=64, ratios=(8,)))

    def temporary(length):
        def loss(params, words):
            return (model.bind(params)(words, deterministic=False, key=jax.random.key(0))[0] ** 2).sum()

        lowered = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2.2 * temporary(1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ratios": (2, 3)},
            r"ratios has 3, which does not divide .*window=8; those that do are 1, 2, 4, 8$",
        ),
        ({"ratios": (16,)}, "ratios has 16"),
        ({"eval_ratios": (0, 2)}, r"eval_ratios has 0.*or \(0,\) alone"),
        ({"ratios": ()}, "ratios.* is empty"),
        ({"stride": 4}, r"stride=4: .*use None or model.beacon.window=8"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"positions": 11}, r"window=8 with its beacons needs 12 positions, but .*positions=11"),
        ({"eval_mix": "adapt-10"}, "eval_mix='adapt-10' needs model.beacon.positions"),
        ({"eval_mix": "step-random"}, "eval_mix='step-random' is unknown"),
        ({"mix": "often"}, "mix='often' is unknown"),
        ({"variant": "last"}, "variant='last' is unknown"),
        ({"attend_previous": False}, "attend_previous=False needs"),
        ({"sinks": 3}, r"sinks=3 must lie in 0..2"),
        ({"init_id": 31}, r"init_id=31 is no id; use one in 0..30"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change).validate()


def test_backbones_and_tasks_that_cannot_work_are_named():
    for pattern in ("M*", "--"):
        with pytest.raises(ValueError, match=rf"model.pattern='{re.escape(pattern)}' has"):
            config(pattern).validate()
    for field, value in (("window", 4), ("causal", False)):
        settings = config()
        setattr(settings.attention, field, value)
        with pytest.raises(ValueError, match=r"model.attention.window=.* use None and True"):
            settings.validate()
    settings = config()
    settings.max_positions = 64
    with pytest.raises(ValueError, match="model.max_positions=64"):
        settings.validate()
    for field, value, message in (
        ("seq_len", 8, "task.seq_len=8 is not above model.beacon.window=8"),
        ("packing", "buckets", "task.shortest_seq_len=8 is not above"),
        ("carry_state", True, "task.carry_state=True"),
    ):
        experiment = BeaconExperiment(model=config())
        experiment.task.shortest_seq_len = 8
        setattr(experiment.task, field, value)
        with pytest.raises(ValueError, match=message):
            experiment.validate()

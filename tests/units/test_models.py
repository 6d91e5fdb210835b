"""The language model: patterns and their runs, chunked loss, streaming, carried-state layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.attention import AttentionConfig
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from layers.types import Context
from models import backbone, pattern
from models.config import LMConfig
from models.functional import Functional, parameter_count
from models.lm import LM
from models.loss import chunked_cross_entropy

HYBRID_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
CONFIG = LMConfig(
    vocab_size=61,
    d_model=32,
    pattern="MM*-M",
    mamba2=Mamba2Config(d_state=16, headdim=8, chunk_size=8),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=MLPConfig(hidden=48),
)


def build(config=CONFIG):
    model = Functional.create(lambda rngs: LM(config, rngs=rngs))
    return model, model.init(jax.random.key(0))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 24)), jnp.int32)


@pytest.mark.parametrize("text", ["M", "M" * 48, "M-" * 12 + "*", HYBRID_8B, "M*-", "MMMM*MMMM*MM"])
def test_runs_are_the_pattern(text):
    runs = pattern.runs(text)
    assert "".join(unit * count for unit, count in runs) == text
    assert sum(len(unit) for unit, _ in runs) <= len(set(text)) + 20


def test_runs_are_maximal():
    assert pattern.runs("M" * 64) == [("M", 64)]
    assert pattern.runs("M-M-M-*-") == [("M-", 3), ("*-", 1)]


def test_pattern_repeats():
    assert pattern.parse("(M-)3*-", "M*-") == "M-M-M-*-"
    for bad in ("(M-", "(M)", "M)2"):
        with pytest.raises(ValueError, match=r"model.pattern"):
            pattern.parse(bad, "M*-")


def test_stacked_layers_equal_the_same_layers_apart():
    """The run "MM" has stacked weights."""
    model, params = build()
    bound, ctx = model.bind(params), Context.create(2, 24)
    hidden = bound(TOKENS)[0]
    x = bound.embed(TOKENS, ctx.positions, jnp.float32)
    for run in bound.backbone.runs:
        for i in range(run.repeats):
            for layer in run.layers:
                one = layer if run.repeats == 1 else jax.tree.map(lambda p, i=i: p[i], layer)
                x, _ = one(x, None, ctx)
    np.testing.assert_allclose(bound.norm(x), hidden, atol=1e-5)


def test_weights_taken_apart_are_the_same():
    model, params = build()
    bound = model.bind(params)
    want = bound(TOKENS)[0]
    bound.backbone.take_apart()
    assert any(run.apart for run in bound.backbone.runs)
    np.testing.assert_array_equal(bound(TOKENS)[0], want)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_runs_equal_unrolled_ones(remat, monkeypatch):
    model, params = build(dataclasses.replace(CONFIG, pattern="MM", remat=remat))

    def results():
        state = model.bind(params).init_state(2, 24)
        objective = lambda p: jnp.sum(jnp.sin(model.bind(p)(TOKENS)[0]))  # noqa: E731
        return jax.jit(lambda p: (model.bind(p)(TOKENS, state)[:2], jax.grad(objective)(p)))(params)

    unrolled = results()
    monkeypatch.setattr(backbone, "UNROLLED", 0)

    def close(a, b):  # gradients reach 170 here: rounding errors go with the largest element
        np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max(), rtol=0)

    jax.tree.map(close, results(), unrolled)


@pytest.mark.parametrize("splits", [(24,), (7, 17), (1,) * 24], ids=str)
def test_streaming_with_documents_and_padding(splits):
    model, params = build()
    ids = jnp.asarray([[0] * 3 + [1] * 9 + [2] * 8 + [0] * 4, [4] * 13 + [7] * 11], jnp.int32)
    apply = jax.jit(lambda p, t, s, i: model.bind(p)(t, s, segment_ids=i)[:2])
    whole, _ = apply(params, TOKENS, None, ids)
    state, start, pieces = model.bind(params).init_state(2, 24), 0, []
    for n in splits:
        hidden, state = apply(params, TOKENS[:, start : start + n], state, ids[:, start : start + n])
        pieces.append(hidden)
        start += n
    got = jnp.concatenate(pieces, 1)
    real = np.asarray(ids != 0)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(whole)[real], atol=2e-5)
    np.testing.assert_array_equal(state["segment"], [2, 7])
    np.testing.assert_array_equal(state["position"], [7, 10])


def test_every_state_counts_rows_first():
    model, params = build()
    three = jax.eval_shape(lambda: model.bind(params).init_state(3, 8))
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(three))


@pytest.mark.parametrize("batch", [1, 2])
def test_one_token_updates_caches_in_place(batch):
    """Neither a copy of a cache nor a stack of several, which would grow with the context."""
    model, params = build(dataclasses.replace(CONFIG, pattern="**"))

    def steps(params, token, state):
        lm = model.bind(params)
        return jax.lax.scan(lambda state, _: (lm(token, state)[1], None), state, length=3)[0]

    token, state = jnp.ones((batch, 1), jnp.int32), model.bind(params).init_state(batch, 4096)
    compiled = jax.jit(steps, donate_argnums=2).lower(params, token, state).compile()
    (cache,) = {leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.size > batch * 4096}
    assert compiled.memory_analysis().temp_size_in_bytes < cache


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunks", [0, 1, 4, 24])
def test_chunked_loss_and_gradients(tied, chunks):
    model, params = build(dataclasses.replace(CONFIG, tie_embeddings=tied))
    hidden = model.bind(params)(TOKENS)[0]
    targets = jnp.roll(TOKENS, -1, axis=1)
    weights = jnp.asarray(np.random.default_rng(1).uniform(size=TOKENS.shape), jnp.float32)

    def chunked(params, hidden):
        nll, log_z = chunked_cross_entropy(model.bind(params), hidden, targets, chunks)
        return jnp.sum(weights * (nll + 0.1 * log_z**2))

    def dense(params, hidden):
        logits = model.bind(params).logits(hidden)
        log_z = jax.nn.logsumexp(logits, -1)
        nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * (nll + 0.1 * log_z**2))

    for got, want in zip(
        *(jax.tree.leaves(jax.value_and_grad(f, (0, 1))(params, hidden)) for f in (chunked, dense))
    ):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_loss_chunks_must_divide():
    model, params = build()
    with pytest.raises(ValueError, match=r"model.loss_chunks=5 does not divide the sequence length 24"):
        chunked_cross_entropy(model.bind(params), jnp.zeros((2, 24, 32)), TOKENS, 5)


def test_logits_never_exist_whole():
    """At V = 50,000 and L = 2048 the largest array of the loss and its gradient stays below 64 MiB."""
    config = dataclasses.replace(CONFIG, vocab_size=50_000)
    model = Functional.create(lambda rngs: LM(config, rngs=rngs))

    def loss(params, hidden, targets):
        return jnp.sum(chunked_cross_entropy(model.bind(params), hidden, targets)[0])

    shapes = jax.ShapeDtypeStruct((2, 2048, 32), jnp.float32), jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    compiled = jax.jit(jax.grad(loss)).lower(model.shapes, *shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 64 * 2**20 < 2 * 2048 * 50_000 * 4


def test_pieces_of_the_loss_are_of_what_a_device_has(mesh):
    """3.3 GB of logits in pieces below 64 MiB; on (fsdp 4, sequence 2) an eighth of them."""
    config = dataclasses.replace(CONFIG, vocab_size=50_000)
    model = Functional.create(lambda rngs: LM(config, rngs=rngs))
    hidden, targets = (
        jax.ShapeDtypeStruct((8, 2048, 32), jnp.float32),
        jax.ShapeDtypeStruct((8, 2048), jnp.int32),
    )

    def pieces():
        loss = lambda params, *args: chunked_cross_entropy(model.bind(params), *args)[0]  # noqa: E731
        traced = jax.make_jaxpr(loss)(model.shapes, hidden, targets)
        return [e.params["length"] for e in traced.jaxpr.eqns if e.primitive.name == "scan"]

    alone = pieces()
    with jax.set_mesh(mesh(1, 4, 1, 2)):
        assert (alone, pieces()) == ([64], [8])


def test_padding_ids_are_never_likely():
    model, params = build()
    assert CONFIG.padded_vocab_size == 64
    logits = model.bind(params).logits(model.bind(params)(TOKENS)[0])
    assert logits.shape[-1] == 64 and (logits[..., 61:] == -1e30).all()


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_changes_no_value(remat):
    model, params = build(dataclasses.replace(CONFIG, remat=remat))
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(model.bind(p)(TOKENS)[0])))(params)
    plain, _ = build()
    want = jax.grad(lambda p: jnp.sum(jnp.sin(plain.bind(p)(TOKENS)[0])))(params)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4, rtol=1e-4), grads, want)


def test_counts():
    model, params = build()
    assert parameter_count(model.shapes) == sum(x.size for x in jax.tree.leaves(params))
    lm = model.bind(model.shapes)
    mamba = 2 * 32 * (3 * 64 + 2 * 16 + 8) + 2 * 4 * (64 + 32) + 2 * 8 * 16 + 2 * 8 * 64 + 4 * 16 * 64
    assert lm.backbone.runs[0].layers[0].mixer.flops_per_token(64) == mamba
    assert lm.flops_per_token(64) > 3 * mamba + 2 * 32 * 64

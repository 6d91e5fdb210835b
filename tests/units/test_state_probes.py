"""Probes that look inside a model, against direct computation on a tiny hybrid of five kinds of layer."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from eval import run
from eval.opened import OpenRun
from eval.probes import PROBES, choose
from eval.probes.influence import _program as influence_program
from eval.probes.influence import _summary
from eval.probes.inside import plain_model, text_rows
from eval.probes.mutual_information import _fit
from eval.probes.receptive_field import attention_weights, hidden_attention, mean_distance
from eval.probes.smoothing import _apart
from eval.probes.speed import state_bytes
from eval.probes.state_collapse import _verdict
from eval.probes.state_watch import watch
from eval.probes.types import NotApplicable
from layers.dynamics import Dynamics, read_out
from layers.mamba import MambaConfig
from layers.s4d import S4DConfig
from layers.types import Context
from models.functional import Functional
from models.loss import chunked_cross_entropy
from models.registry import TINY_MIXERS
from models.walk import embed, walk
from objectives import model_of
from runtime import mesh as meshes
from tasks.tokenizer import ByteTokenizer
from tests.experiments import tiny, write_corpus

INSIDE = {  # on every kind of layer
    "state_collapse": {"factor": 2.0, "rows": 2, "bucket": 8},
    "smoothing": {"rows": 2},
    "receptive_field": {"factors": (0.5, 1.0, 2.0), "rows": 2},
}
OUTSIDE = {  # on attention alone
    "influence": {"rows": 2, "directions": 2},
    "mutual_information": {"shortest": 8, "min_rows": 2, "factor": 1.0},
    "speed": {"factors": (1.0, 2.0), "steps": 2, "warmup": 1, "repeats": 1},
}


def open_untrained(pattern, directory) -> OpenRun:
    """Every number of a probe has its meaning before any training."""
    config = tiny(directory / "corpus")
    config.task.eval_fraction = 0.3
    config.model.pattern = pattern
    config.model.mamba, config.model.s4d = MambaConfig(d_state=4), S4DConfig(d_state=4)
    config.validate()
    model = model_of(config)
    params = jax.jit(model.init)(jax.random.key(0))
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.local_devices()[:1])
    return OpenRun(epath.Path(directory / "run"), config, 0, model, params, None, ByteTokenizer(), mesh)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("state_probes")
    write_corpus(directory / "corpus")
    return directory


@pytest.fixture(scope="module")
def opened(directory):
    return open_untrained("M--mD", directory)


@pytest.fixture(scope="module")
def small(directory):
    return open_untrained("*", directory)


@pytest.fixture(scope="module")
def results(opened, small):
    found = {}
    for run_, settings in ((opened, INSIDE), (small, OUTSIDE)):
        with jax.set_mesh(run_.mesh):
            for name, fields in settings.items():
                probe = PROBES[name](**fields)
                found[name] = probe, probe.run(run_, print)
    return found


@pytest.fixture(scope="module")
def tokens(opened):
    return text_rows(opened, 64, 4).astype(np.int32)


@pytest.fixture(scope="module")
def direct(opened, tokens):
    """One pass of the model: nats, state after it; and the dynamics of two layers."""

    @jax.jit
    def call(params, tokens):
        lm, ones = opened.model.bind(params), jnp.ones_like(tokens[:, :-1])
        hidden, state, _ = lm(tokens[:, :-1], lm.init_state(*ones.shape))
        nll, _ = chunked_cross_entropy(lm, hidden, tokens[:, 1:])
        ctx = Context.create(*ones.shape)
        visits = itertools.islice(walk(lm, embed(lm, tokens[:, :-1], ctx), ctx), 0, 4, 3)
        dynamics = {v.depth: v.mixer.dynamics(v.inner, None, ctx) for v in visits}
        return nll, state["layers"], dynamics

    return call(opened.params, tokens)


def test_watching_layer_by_layer_sees_the_losses_and_states_of_one_pass(opened, tokens, direct):
    nll, states, dynamics = direct
    with jax.set_mesh(opened.mesh):
        seen = watch(opened, tokens, 8, print)
    np.testing.assert_allclose(seen.loss, nll, rtol=1e-4, atol=1e-5)
    assert list(seen.layers) == [0, 3, 4]
    flat = [state for run_ in states for repeat in run_ for state in repeat]
    for depth in (0, 3):
        S = np.asarray(flat[depth]["ssm"], np.float64)
        S = S.reshape(*S.shape[:2], -1)
        expected = [S.mean(-1), S.var(-1), np.sqrt((S**2).mean(-1)), np.median(S, -1)]
        at = seen.layers[depth]
        np.testing.assert_allclose(at["state"][:, -1], np.stack(expected, -1), rtol=1e-3, atol=1e-6)
        x, dt, A, B, _ = (np.asarray(t, np.float64) for t in dynamics[depth])
        slowest = np.cumsum(dt, 1)[:, 7::8] * A.max(axis=1)
        np.testing.assert_allclose(at["log_retention"], slowest, rtol=1e-3)
        for name, value in (("dt", dt), ("x", np.linalg.norm(x, axis=-1)), ("B", np.linalg.norm(B, axis=-1))):
            mean = value.reshape(4, 8, 8, -1).mean(axis=2)
            np.testing.assert_allclose(at[name], mean, rtol=1e-3, atol=1e-6)
    decay = seen.layers[4]["log_retention"]
    np.testing.assert_allclose(decay, decay[:, :1] * np.arange(1, 9)[:, None], rtol=1e-5)
    assert (decay < 0).all() and seen.layers[0]["conv"].shape == (4, 8, 4) and "conv" not in seen.layers[4]


def test_every_probe_finds_numbers_and_curves_and_can_draw_them(results):
    for name, (probe, result) in results.items():
        assert result.numbers["training_length"] == 32
        assert all(len(c.x) == len(c.y) > 0 for c in result.curves.values()), name
        drawn = sum(len(axes.lines) for axes in probe.plot(result).axes)
        assert drawn >= len(result.curves) > 0
        assert bool(result.arrays) == (name in ("state_collapse", "influence", "smoothing"))


def test_arrays_of_states_by_layer_bucket_and_head(results):
    result = results["state_collapse"][1]
    numbers, arrays = result.numbers, result.arrays
    assert numbers["layers"] == {"mamba2": [0], "mamba": [3], "s4d": [4]}
    assert numbers["rows"] == {"text": 2, "newlines": 1, "fact": 1} and numbers["length"] == 64
    for kind, heads in (("mamba2", 8), ("mamba", 64), ("s4d", 32)):
        assert arrays[f"fact/{kind}/state"].shape == (1, 8, heads, 4)
    assert arrays["text/mamba2/channel_rms"].shape == (1, 2, 8, 8)  # heads of 8 channels
    rms = np.sqrt(np.square(arrays["text/mamba2/channel_rms"][0]).mean(axis=-1))
    np.testing.assert_allclose(rms, arrays["text/mamba2/state"][0][[3, 7], :, 2], rtol=0.2)  # means over rows
    growth, loss = numbers["loss_growth"]["text"], arrays["text/loss"]
    np.testing.assert_allclose(growth, loss[4:].max() / loss[:4].max(), rtol=1e-6)
    assert numbers["forgets"] == int(growth <= 2)


def test_collapse_takes_a_loss_and_a_variance_that_grow():
    def case(late_loss, late_var):
        loss = np.array([[4.0, 3.0, 3.0, late_loss]])
        state = np.ones((4, 2, 4))
        state[3, 1, 1] = late_var
        states = {"text": {5: {"state": state, "log_retention": np.zeros((4, 2))}}}
        return _verdict({"text": loss}, states, {5: "mamba2"}, 2)

    fine, worse, bad = case(7.9, 9.0), case(8.1, 3.9), case(8.1, 4.1)
    assert [c["forgets"] for c in (fine, worse, bad)] == [1, 0, 0]
    assert [c["collapses"]["text"] for c in (fine, worse, bad)] == [0, 0, 1]
    assert bad["fastest_growing_head"]["text"] == "layer 5 (mamba2), head 1"
    np.testing.assert_allclose(bad["variance_growth"]["text"], 4.1)


def test_influence_is_the_norm_of_the_jacobian(small):
    model, params, rows = small.model, small.params, jnp.arange(12).reshape(2, 6)
    ends, width = np.array([5, 3]), small.config.model.d_model
    found = influence_program(model)(params, rows, ends, np.eye(width, dtype=np.float32))

    @jax.jit
    def jacobian(params):
        lm, ctx = model.bind(params), Context.create(2, 6)
        # Rows know nothing of each other: their sum has the Jacobians of all.
        hidden = lambda x: lm.norm(lm.backbone(x, None, ctx)[0])[:, ends].sum(axis=0)  # noqa: E731
        return jax.jacrev(hidden)(embed(lm, rows, ctx))  # [end, D, B, s, D]

    expected = np.sqrt((np.asarray(jacobian(params)) ** 2).sum(axis=(1, 4)) / width)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_the_slope_of_an_exponential_decay():
    lags = np.arange(200)
    rows = np.exp(-np.outer([0.02, 0.04], lags))
    found = _summary(rows, 100)
    np.testing.assert_allclose([found["slope"], found["r2"]], [-0.03, 1], atol=1e-9)
    np.testing.assert_allclose(found["slope_standard_error"], 0.01, rtol=1e-6)
    shares = rows[:, :64].sum(1) / rows.sum(1)
    np.testing.assert_allclose(found["share_of_last_64"], shares.mean())


def test_distances_of_all_pairs():
    x = np.random.default_rng(0).normal(size=(2, 40, 5)) + 3
    pairs = [(i, j) for i in range(40) for j in range(i)]
    norm = np.linalg.norm(x, axis=-1)
    distance = np.mean([np.linalg.norm(x[:, i] - x[:, j], axis=-1) for i, j in pairs], axis=0)
    cosine = np.mean([(x[:, i] * x[:, j]).sum(-1) / norm[:, i] / norm[:, j] for i, j in pairs], axis=0)
    expected = np.stack([distance, distance / norm.mean(axis=1), cosine], axis=1)
    np.testing.assert_allclose(jax.jit(_apart)(x.astype(np.float32)), expected, rtol=1e-4)


@pytest.mark.parametrize("decays", [1, 4])
def test_hidden_attention_is_what_the_output_has_of_each_token(decays):
    draw, length, heads = np.random.default_rng(0), 9, 4

    def positive(*shape):
        return jnp.asarray(np.broadcast_to(draw.uniform(0.1, 1, shape), (length, *shape[1:])), jnp.float32)

    dt, B, C = positive(1, length, heads), positive(1, length, 2, 4), positive(1, length, 2, 4)
    A = -jnp.asarray(draw.uniform(0.1, 1, (heads, decays)), jnp.float32)
    # Row j has an input at token j alone.
    impulses = jnp.tile(jnp.eye(length)[:, :, None, None], (1, 1, heads, 1))
    dynamics = Dynamics(impulses, dt, A, B, C)
    y = jax.jit(read_out)(dynamics)[..., 0]
    for n in (9, 5):
        alpha = hidden_attention(jax.tree.map(lambda t: t[:1] if t is not A else t, dynamics), n)[0]
        np.testing.assert_allclose(alpha, y[:n, n - 1].T, rtol=1e-4, atol=1e-6)


def test_attention_weights_are_those_of_the_softmax():
    model = Functional.create(TINY_MIXERS["attention_alibi"])
    params = jax.jit(model.init)(jax.random.key(1))
    x = jax.random.normal(jax.random.key(0), (2, 10, 32))

    @jax.jit
    def both(params, x):
        layer = model.bind(params)
        q, k, _ = layer._heads(x)
        k = jnp.repeat(k, 2, axis=2)  # two query heads a key head
        slopes = 2.0 ** -jnp.array([2.0, 4.0, 6.0, 8.0])
        logits = jnp.einsum("bhe,bjhe->bhj", q[:, -1], k) * layer.head_dim**-0.5
        logits -= slopes[:, None] * (9 - jnp.arange(10))
        return attention_weights(layer, x), jax.nn.softmax(logits)

    np.testing.assert_allclose(*both(params, x), rtol=1e-4, atol=1e-6)


def test_weights_of_core_context_attention_reach_the_tokens_behind_the_cores():
    model = Functional.create(TINY_MIXERS["cca"])
    params = jax.jit(model.init)(jax.random.key(1))
    x = jax.random.normal(jax.random.key(0), (2, 21, 32))
    weights = jax.jit(lambda p, x: attention_weights(model.bind(p), x))(params, x)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (np.asarray(weights[..., :8]) > 0).all()


def test_the_mean_distance_of_even_attention_is_half_the_length():
    row = np.stack([np.ones(11), -np.eye(11)[0]])  # and all of it on the first token
    np.testing.assert_allclose(jax.jit(mean_distance)(row.astype(np.float32)), (5.0 + 10.0) / 2)


def test_the_exponent_of_a_power_law():
    lengths = np.array([16, 32, 64, 128])
    rows = np.random.default_rng(0).uniform(0.8, 1.2, (30, 1)) * lengths**0.7
    found = _fit(lengths, rows)
    np.testing.assert_allclose([found["beta"], found["r2"]], [0.7, 1], rtol=1e-9)
    np.testing.assert_allclose([found["beta_low"], found["beta_high"]], [0.7, 0.7], rtol=1e-6)


def test_bytes_carried_are_counted(opened, results):
    found = results["speed"][1].numbers
    last = 8  # position and segment
    window = 24 * 2 * 2 * 8 * 4 + 4 + last
    assert found["state_bytes"] == {"1x": window, "2x": window}
    assert abs(found["slope"]["state_bytes"]) < 1e-9 and found["decode_ms_median"]["1x"] > 0
    recurrent = 8 * 8 * 16 + 3 * (64 + 2 * 32) + 64 * (4 + 3) + 32 * 2 * 2  # Mamba-2, Mamba-1, S4D
    assert state_bytes(opened.model, 3, 64) == 3 * (4 * recurrent + last)


def test_what_cannot_be_looked_into_is_told(opened, tmp_path):
    config = dataclasses.replace(opened.config, model=dataclasses.replace(opened.config.model, pattern="*-"))
    attention = dataclasses.replace(opened, config=config, model=model_of(config), workdir=tmp_path)
    (record,) = run.examine(attention, choose("state_collapse"), tmp_path)
    assert record["not_applicable"] == "there is no recurrent layer in model.pattern='*-'"
    with pytest.raises(ValueError, match=r"state_collapse.factor=0.5 should be at least 1"):
        choose("state_collapse", ["state_collapse.factor=0.5"])
    with pytest.raises(NotApplicable, match="less than one row of 1000000 targets"):
        text_rows(opened, 1_000_000, 1)
    decimated = dataclasses.replace(
        opened.config.model, decimate=dataclasses.replace(opened.config.model.decimate, layers=(3,))
    )
    config = dataclasses.replace(opened.config, model=decimated)
    with pytest.raises(NotApplicable, match="prompts are decimated"):
        plain_model(dataclasses.replace(opened, config=config, model=model_of(config)))

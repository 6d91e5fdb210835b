"""Mitigations on a run: calibrated and switched on when it is opened, prompts decimated, chunks chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import ConfigError
from configs.saved import overridden
from eval import calibrate, oprm
from eval.calibrated import FILE, load
from eval.generate import Generator
from eval.opened import RunError, open_run
from layers.decimation import DecimateConfig
from models.functional import Functional
from models.lm import LM
from objectives import model_of
from runtime.checkpoint import Checkpoints
from tests.experiments import tiny, write_corpus

SWITCHED = ["model.mamba2.dt_filter.scale=1.0", "model.mamba2.mitigation.state_norm=2.0"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose only checkpoint holds fresh parameters."""
    directory = tmp_path_factory.mktemp("run")
    config = tiny(write_corpus(directory / "corpus"))
    config.model.pattern, config.task.packing = "MM", "stream"  # rows without padding
    (directory / "config.json").write_text(config.to_json())
    params = jax.jit(model_of(config).init)(jax.random.key(0))
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, {"params": params}, wait=True)
    return directory


@pytest.fixture(scope="module")
def opened(workdir):
    return open_run(workdir)


def test_calibration_is_needed_measured_and_read(workdir, opened, capsys):
    config = overridden(opened.config, SWITCHED)
    with pytest.raises(ConfigError, match=r"calibration.npz does not exist, .*python -m eval.calibrate"):
        open_run(workdir, config=config)
    calibrate.main([f"--workdir={workdir}", "--slices=4"])
    assert "of 16 channels are global" in capsys.readouterr().out
    values = load(opened.workdir / FILE)
    mixer = open_run(workdir, config=config).params["backbone"]["runs"][0]["layers"][0]["mixer"]
    np.testing.assert_array_equal(mixer["norm_cap"], values["backbone/runs/0/layers/0/mixer/norm_cap"])
    heads = mixer["norm_cap"].shape[1]
    assert mixer["norm_cap"].shape[0] == 2 and (mixer["norm_cap"] > 0).all()  # two stacked layers
    assert mixer["dt_filter"]["thresholds"].shape == (2, 8, heads)
    assert (mixer["dt_filter"]["base"] == opened.config.task.seq_len).all()
    assert (jnp.diff(mixer["dt_filter"]["thresholds"], axis=1) >= 0).all()
    without = dataclasses.replace(opened.config.model, pattern="*-")
    attention = Functional.create(lambda rngs: LM(without, rngs=rngs))
    with pytest.raises(RunError, match="no language model with a Mamba or Mamba-2 layer"):
        calibrate.calibrate(dataclasses.replace(opened, model=attention))


def test_a_decimated_prompt(opened):
    """Rows that keep all their tokens are what they are without; others keep the tail and the best."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 24)), jnp.int32)
    ids = jnp.asarray(np.arange(24) < [[24], [9]], jnp.int32)

    def read(decimate):
        config = dataclasses.replace(opened.config.model, decimate=decimate)
        model = Functional.create(lambda rngs: LM(config, rngs=rngs))

        @jax.jit
        def run(params):
            lm = model.bind(params)
            hidden, state, out = lm(tokens, lm.init_state(2, 30), segment_ids=ids)
            return hidden, state, out.get("kept")

        return run(opened.params)

    whole, state, kept = read(DecimateConfig())
    assert kept is None
    hidden, after, kept = read(DecimateConfig(layers=(0, 1), base=10, minimum=5, tail=4))
    assert kept[0].sum() == 9 and kept[0, -4:].all() and kept[1, :9].all()
    np.testing.assert_allclose(hidden[1, :9], whole[1, :9], atol=1e-5)
    assert not hidden[0][~kept[0]].any() and np.abs(hidden - whole)[0, -1].max() > 1e-4
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert after["position"].tolist() == [23, 8]
    with pytest.raises(ValueError, match="sub-layer 2 of 'MM' is no Mamba"):
        overridden(opened.config, ["model.decimate.layers=[2]"]).model.validate()


def test_the_chunk_read_with_the_least_doubt(opened, monkeypatch):
    generator = Generator(opened)
    monkeypatch.setattr(generator, "generate", lambda prompts, *rest, **settings: prompts)
    text, query, start = np.arange(50), np.arange(60, 66), np.asarray([256])
    got = oprm.answer(generator, text.tolist(), query.tolist(), 20, before=[256])
    prompts = [np.concatenate([start, text[i : i + 20], query]) for i in (0, 20, 40)]
    padded = np.stack([np.pad(p, (0, 27 - len(p))) for p in prompts])

    @jax.jit
    def log_p(params):
        lm = opened.model.bind(params)
        return jax.nn.log_softmax(lm.logits(lm(jnp.asarray(padded, jnp.int32))[0]))

    each = np.asarray(log_p(opened.params), np.float64)
    entropy = [-np.sum(np.exp(p[len(q) - 1]) * p[len(q) - 1]) for p, q in zip(each, prompts)]
    likely = [np.mean([p[len(q) - 7 + i, query[i]] for i in range(6)]) for p, q in zip(each, prompts)]
    np.testing.assert_allclose(got.entropy, entropy, atol=1e-4)
    np.testing.assert_allclose(got.query, likely, atol=1e-4)
    assert got.chunk == np.argmin(entropy) and got.completion == prompts[got.chunk].tolist()
    best = oprm.answer(generator, text.tolist(), query.tolist(), 20, before=[256], criterion="query")
    assert best.chunk == np.argmax(likely) and best.completion == prompts[best.chunk].tolist()
    for settings, message in (
        ({"chunk": 0}, "chunk=0 should be at least 1"),
        ({"chunk": 4, "criterion": "luck"}, "criterion='luck' is unknown; use one of entropy, query"),
    ):
        with pytest.raises(ValueError, match=message):
            oprm.answer(generator, text.tolist(), query.tolist(), **settings)

"""Activation Beacon in the program: a plug-in to a run, on eight devices, resumed, generating, probed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import train
from configs import beacon_papers, beacon_stdlib
from configs.beacon import with_beacons
from eval import run as probes
from eval.curves import read_records
from eval.decode import decode
from eval.opened import open_run
from eval.probes import choose
from eval.sampling import Sampling
from layers.beacon_ratios import BeaconConfig
from models.beacon import copy_backbone
from objectives import model_of
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig
from tests.experiments import tiny, write_corpus

DEVICE = jax.devices()[:1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


def small(corpus, steps=1):
    experiment = tiny(corpus, steps=steps)
    experiment.model.pattern, experiment.model.attention.window = "*-", None
    experiment.task.eval_fraction, experiment.task.eval_batches = 0.3, 1
    experiment.optim = OptimConfig(lr=1e-2)
    return experiment


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory):
    """A run of a plain language model."""
    workdir = tmp_path_factory.mktemp("source")
    train.run(small(corpus), workdir, DEVICE)
    return workdir


def plugged(corpus, source):
    experiment = with_beacons(small(corpus, steps=4), BeaconConfig(window=8, ratios=(2, 4), eval_ratios=(4,)))
    experiment.init_from, experiment.mesh = str(source), MeshConfig(1, 2, 2, 2)
    experiment.checkpoint.every = 2
    return experiment


@pytest.fixture(scope="module")
def finished(corpus, source, tmp_path_factory):
    """Beacons trained on it, on a mesh of eight devices."""
    workdir = tmp_path_factory.mktemp("beacon")
    train.run(plugged(corpus, source), workdir)
    return workdir


@pytest.fixture(scope="module")
def opened(finished):
    return open_run(finished)


def losses(workdir):
    return [r["train/loss"] for r in read_records(workdir / "metrics.jsonl") if "train/loss" in r]


def test_only_beacons_move_and_they_begin_as_copies(corpus, source, opened, finished):
    before, after = flatten_dict(open_run(source).params), flatten_dict(opened.params)
    started = flatten_dict(open_run(finished, 2).params)
    moved = set()
    for path, value in after.items():
        if path in before:
            np.testing.assert_array_equal(value, before[path])
        else:
            moved.add("/".join(map(str, path)))
            assert jnp.any(value != started[path]), path
    mixer = "backbone/runs/0/layers/0/mixer/beacon"
    assert moved == {"beacon_embed", *(f"{mixer}/{name}/kernel" for name in "qkv")}
    assert losses(finished)[-1] < losses(finished)[0]
    with_moments = [r for r in (finished / "parameters.txt").read_text().splitlines() if "frozen" not in r]
    assert sum("beacon" in line for line in with_moments) == len(moved)


def test_the_first_loss_is_that_of_copies_on_one_device(corpus, source, finished):
    experiment = plugged(corpus, source)
    experiment.mesh = MeshConfig(1)
    s = train.setup(experiment, DEVICE)
    params = flatten_dict(s.model.init(jax.random.key(0))) | flatten_dict(open_run(source).params)
    params = copy_backbone(experiment.model, unflatten_dict(params))
    batch = {name: jnp.asarray(array) for name, array in s.objective.task.train()[0].items()}
    first = read_records(finished / "metrics.jsonl")[0]
    key = jax.random.fold_in(jax.random.key(experiment.train.seed), 0)
    (total, weight), (_, metrics) = jax.jit(
        lambda params, batch: s.objective.loss(s.model.bind(params), batch, None, key)
    )(params, batch)
    np.testing.assert_allclose(total / weight, first["train/loss"], rtol=2e-5)
    beacons, tokens = metrics["beacons_per_token"]
    np.testing.assert_allclose(beacons / tokens, first["train/beacons_per_token"], rtol=1e-5)


def test_resumed_to_the_bit(corpus, source, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train.run(plugged(corpus, source), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(finished)


def test_generation_of_uneven_prompts_is_what_one_pass_predicts(opened):
    prompts = [np.arange(1, 31), np.arange(40, 45), np.array([256])]
    blocks = decode(opened.model, opened.params, prompts, 21, Sampling(temperature=0), piece=13, steps=20)
    made = np.concatenate(list(blocks), axis=1)
    texts = [np.concatenate([prompt, row]) for prompt, row in zip(prompts, made)]
    tokens, ids = np.zeros((2, 3, 51), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], ids[row, : len(text)] = text, 1
    predicted = jax.jit(
        lambda params, tokens, ids: (m := opened.model.bind(params)).logits(m(tokens, segment_ids=ids)[0])
    )(opened.params, tokens, ids).argmax(-1)
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(predicted[row, len(prompt) - 1 :][:21], made[row])


def test_probes_read_it_as_any_language_model(opened, finished, tmp_path):
    few = ["loss_by_position.min_documents=2", "length_extrapolation.min_rows=2"]
    few += ["length_extrapolation.factors=[1.0,2.0]", "loss_by_position.factor=2", "condensing.ratios=[2]"]
    probes.examine(opened, choose("loss_by_position,length_extrapolation,condensing", few), tmp_path)
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "4").glob("*.json")}
    assert set(found) == {"loss_by_position", "length_extrapolation", "condensing"}
    packed = found["loss_by_position"]["numbers"]["validation_rows"]["loss"]
    want = json.loads((finished / "result.json").read_text())["validation/loss"]
    np.testing.assert_allclose(
        packed, want, rtol=1e-5, err_msg="read in pieces with a state, and in one pass"
    )
    numbers = found["condensing"]["numbers"]
    assert list(numbers["loss"]) == ["full", "ratio_2", "truncated"]
    assert numbers["lost"]["full"] == 0 and numbers["lost"]["truncated"] == 1
    a_slot = 2 * 2 * 8 * 4  # keys and values, heads, head dim, bytes
    held = {name: size / a_slot for name, size in numbers["kv_bytes"].items()}
    assert held == {"full": 32, "ratio_2": 32 / 2 + 8 + 4, "truncated": 8}


def test_configs(corpus, source, tmp_path):
    config = beacon_stdlib.get_config(f"{source},8")
    config.validate()
    assert config.init_from == str(source) and config.model.beacon.window == 8 and config.model.layers == "*-"
    scratch = beacon_stdlib.get_config("scratch")
    scratch.validate()
    assert scratch.train.unfreeze == () and scratch.model.beacon.window == 128
    with pytest.raises(ValueError, match="there is no config.json in nowhere"):
        beacon_stdlib.get_config("nowhere")
    billions = {}
    for name in ("llama2", "mistral", "qwen2", "qwen2,finetune", "llama2_v1"):
        config = beacon_papers.get_config(name)
        config.validate()
        flat = flatten_dict(model_of(config).shapes)
        added = sum(leaf.size for path, leaf in flat.items() if "beacon" in "/".join(map(str, path)))
        billions[name] = round((sum(leaf.size for leaf in flat.values()) - added) / 1e9, 2), added / 1e9
    assert [n for n, _ in billions.values()] == [6.74, 7.24, 7.62, 7.62, 6.74]
    assert 1.55 < billions["llama2"][1] < 1.65 and 2.1 < billions["llama2_v1"][1] < 2.2
    with pytest.raises(ValueError, match="expected one of llama2, mistral"):
        beacon_papers.get_config("opt")

"""HMT in the loop: any mesh, resuming, a plain run to start from, what moves, generation, probes."""

import json
import shutil

import jax
import numpy as np
import pytest

import train
from configs import hmt_papers, hmt_plugin, hmt_stdlib
from configs.base import ConfigError
from configs.hmt import HMTExperiment
from configs.saved import overridden
from eval import run as eval_run
from eval.curves import read_records
from eval.generate import Generator
from eval.opened import load_config, open_run
from eval.probes import choose
from eval.probes.scoring import long_rows, score, task_of
from models.hmt_config import HMTConfig, MemoryConfig
from models.lora import LoRAConfig
from objectives import model_of
from runtime import run_record, tree_diff
from runtime.checkpoint import Checkpoints
from runtime.freeze import freeze
from runtime.mesh import MeshConfig
from tests.experiments import tiny, write_corpus

DEVICE = jax.devices()[:1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


def experiment(corpus, pattern="*", mesh=None, **memory):
    plain = tiny(corpus, steps=4, mesh=mesh)
    plain.model.pattern, plain.model.attention.window = pattern, None
    plain.task.eval_fraction, plain.checkpoint.every = 0.3, 2
    given = {"segment": 8, "sensory": 2, "queue": 4, "recall_dim": 8, "documents": 2}
    model = HMTConfig(**vars(plain.model), memory=MemoryConfig(**{**given, **memory}))
    return HMTExperiment(**{**vars(plain), "model": model})


def losses(workdir):
    return {r["step"]: r["train/loss"] for r in read_records(workdir / "metrics.jsonl") if "train/loss" in r}


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("hmt")
    return workdir, train.run(experiment(corpus), workdir, DEVICE)


def test_a_run_is_a_language_model_run(trained):
    workdir, results = trained
    assert load_config(workdir).kind == "hmt"
    assert 0 < results["validation/bits_per_byte"] < 9 and losses(workdir)[4] < losses(workdir)[1]
    last = read_records(workdir / "metrics.jsonl")
    assert 0 <= next(r["train/left_out"] for r in last if "train/left_out" in r) < 0.5
    assert "memory/wq/kernel" in (workdir / "parameters.txt").read_text()
    assert (workdir / "report.html").exists()


def test_resuming_is_the_same_to_the_bit(trained, corpus, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    results = train.run(experiment(corpus), tmp_path / "run", DEVICE)
    assert losses(tmp_path / "run") == losses(trained[0])
    assert results["validation/loss"] == trained[1]["validation/loss"]


def test_generation(trained):
    prompts = ["word1 word2 word3 word4", "w"]
    done = Generator.open(trained[0]).generate(prompts, max_new_tokens=20)
    assert [len(c.ids) for c in done] == [20, 20] or any(c.finished == "end" for c in done)


def test_probes(trained, tmp_path):
    few = ["loss_by_position.min_documents=2", "length_extrapolation.min_rows=2"]
    few += ["length_extrapolation.factors=[1, 2, 4]", "passkey.factors=[8]", "passkey.depths=2"]
    few += ['passkey.styles=["stuffed_mamba"]', "passkey.samples=1"]
    probes = choose("bits_per_byte,loss_by_position,length_extrapolation,passkey", few)
    eval_run.examine(open_run(trained[0]), probes, tmp_path)
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "4").glob("*.json")}
    assert not any("error" in record for record in found.values())
    # All of it is read by pieces with the state carried, as in training by whole rows.
    bins = found["loss_by_position"]["numbers"]["bins"]["validation_rows"]
    total = np.average(bins["loss"], weights=bins["tokens"])
    np.testing.assert_allclose(total, trained[1]["validation/loss"], rtol=1e-5)
    assert found["length_extrapolation"]["numbers"]["lengths"]["4x"] == 128
    assert found["passkey"]["numbers"]["prompts"] == 2


def test_one_checkpoint_with_memory_and_without(trained):
    config = load_config(trained[0])
    rows = long_rows(task_of(open_run(trained[0])), 64, 4)
    found = {}
    for recall in ("attention", "none"):
        opened = open_run(trained[0], config=overridden(config, [f"model.memory.recall={recall}"]))
        found[recall] = score(opened, task_of(opened), rows, 64)["loss"][0]
    np.testing.assert_array_equal(found["attention"][:, :8], found["none"][:, :8])
    assert (found["attention"][:, 8:] != found["none"][:, 8:]).mean() > 0.9
    assert overridden(config, ["model.memory.queue=2", "model.memory.bptt_depth=3"]).model.memory.queue == 2
    for wrong, told in (
        ("model.memory.recal=none", "such as model.memory.recall"),
        ("model.memory.queue=many", "model.memory.queue is 'many', expected int"),
    ):
        with pytest.raises(ConfigError, match=told):
            overridden(config, [wrong])
    with pytest.raises(SystemExit):
        eval_run.main([f"--workdir={trained[0]}", "--override=model.memory.recall=none"])


@pytest.mark.slow
def test_a_plain_run_becomes_the_backbone_and_only_what_is_declared_moves(corpus, tmp_path):
    plain = tiny(corpus, steps=3)
    plain.model.pattern, plain.model.attention.window = "*", None
    with Checkpoints(tmp_path / "plain", plain.checkpoint) as checkpoints:  # what a run leaves
        checkpoints.save(1, train.setup(plain, DEVICE).init(jax.random.key(7)), wait=True)
    run_record.save_config(tmp_path / "plain", plain.to_json())
    config = hmt_plugin.get_config(f"{tmp_path / 'plain'},1")
    assert (config.model.memory.slots, config.task.seq_len, config.task.batch_size) == (32, 56, 4)
    config.lora = LoRAConfig(rank=2, alpha=8.0, targets=("embed/table", "all"))
    config.train.unfreeze, config.train.steps = ("base/memory/prompt",), 3
    train.run(config, tmp_path / "hmt", DEVICE)
    before = tree_diff.leaves(open_run(tmp_path / "plain").params)
    first = tree_diff.leaves(train.setup(config, DEVICE).init(jax.random.key(config.train.seed)).params)
    after = tree_diff.leaves(open_run(tmp_path / "hmt").params)
    for path, value in before.items():
        np.testing.assert_array_equal(after[f"base/{path}"], value, err_msg=path)
    moved = {path for path in first if (np.asarray(first[path]) != np.asarray(after[path])).any()}
    adapters = {path for path in first if path.startswith("lora/")}
    loaded = {f"base/{path}" for path in before}
    assert moved - loaded == {"base/memory/prompt", *adapters}  # what was loaded did not begin as here
    config = hmt_plugin.get_config(f"{tmp_path / 'hmt'},2")
    config.validate()
    assert (
        config.model.memory.recall == "attention"
        and config.task.seq_len == 8 * 28
        and not config.train.freeze
    )
    with pytest.raises(ValueError, match="expected RUN,1 or RUN,2"):
        hmt_plugin.get_config(str(tmp_path / "plain"))


@pytest.mark.slow
def test_a_run_on_a_mesh_of_eight_devices_is_the_same(trained, corpus, tmp_path):
    results = train.run(experiment(corpus, mesh=MeshConfig(1, 2, 2, 2)), tmp_path / "run")
    np.testing.assert_allclose(
        list(losses(tmp_path / "run").values()), list(losses(trained[0]).values()), rtol=1e-5
    )
    np.testing.assert_allclose(results["validation/loss"], trained[1]["validation/loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "get_config, arguments",
    [
        (hmt_stdlib.get_config, ("hmt", "rmt", "local", "hmt,M-*-M-")),
        (hmt_papers.get_config, ("opt_350m,1", "opt_2_7b,2", "openllama_3b,1", "llama2_7b,2")),
    ],
)
def test_configs_are_valid_and_name_their_arguments(get_config, arguments):
    for argument in arguments:
        config = get_config(argument)
        config.validate()
        roles = freeze(model_of(config).roles, config.train.freeze, config.train.unfreeze)
        trains = [not role.startswith("frozen") for role in jax.tree.leaves(roles)]
        assert any(trains)
    with pytest.raises(ValueError, match=arguments[0].split(",")[0]):
        get_config("other")

"""Runs to published checkpoints: formats that are found, dtypes, plain tensors, what is refused."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from configs.base import Experiment
from configs.classification import ClassificationExperiment
from eval.opened import RunError
from layers.attention import AttentionConfig
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from models.config import ClassifierConfig, LMConfig
from models.lora import LoRAConfig
from objectives import model_of
from runtime import run_record
from runtime.checkpoint import save_alone
from tests.published_checkpoints import (
    bfloat16,
    bits,
    read_all,
    vectors,
    write_checkpoint,
)
from tools.convert.exporting import export_run
from tools.convert.importing import import_checkpoint
from tools.convert.published_files import ConvertError, PublishedFiles


def test_round_trip_of_mixed_dtypes(tmp_path):
    raw, weights, _ = vectors("hf_nemotronh")
    weights = {n.replace("model.", "backbone.", 1): w for n, w in weights.items()}  # as files have it
    write_checkpoint(tmp_path / "mixed", raw, bfloat16(weights))
    import_checkpoint(tmp_path / "mixed", tmp_path / "run")
    export_run(f"{tmp_path / 'run'}@0", tmp_path / "again")
    assert bits(read_all(tmp_path / "again")) == bits(bfloat16(weights))
    export_run(str(tmp_path / "run"), tmp_path / "wide", dtype="float32")
    wide = {name: w.astype(np.float32) for name, w in bfloat16(weights).items()}
    assert bits(read_all(tmp_path / "wide")) == bits(wide)
    with pytest.raises(RunError, match=r"no checkpoint to export \(step 3\); there are steps \[0\]"):
        export_run(f"{tmp_path / 'run'}@3", tmp_path / "no")


def run_of(directory, experiment):
    """A run with a checkpoint of numbers in place of training; its parameters by path."""
    rng = np.random.default_rng(0)
    shapes = model_of(experiment).shapes
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
    save_alone(directory, 7, {"params": jax.tree.map(jax.numpy.asarray, params)})
    run_record.save_config(directory, experiment.to_json())
    return nnx.traversals.flatten_mapping(params)


def test_a_run_trained_here_finds_its_format(tmp_path):
    mamba2 = Mamba2Config(d_state=16, headdim=8)
    model = LMConfig(d_model=32, pattern="M*-M", mamba2=mamba2, tie_embeddings=False)
    model.attention = AttentionConfig(num_heads=4, num_kv_heads=2, position="none")
    model.mlp = MLPConfig(hidden=48, activation="relu2")
    run_of(tmp_path / "run", Experiment(model=model))
    assert "format nemotron_h" in export_run(str(tmp_path / "run"), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["model_type"], raw["dtype"], raw["vocab_size"]) == ("nemotron_h", "float32", 257)
    opened = PublishedFiles.open(tmp_path / "out", vocab_multiple=model.vocab_multiple)
    assert opened.config.layers == model.layers and opened.config.mlp == model.mlp
    with pytest.raises(ConvertError, match=r"(?s)no published format can hold this .*bamba: .*\[M\*\]\[-\]"):
        export_run(str(tmp_path / "run"), tmp_path / "no", format="bamba")
    with pytest.raises(ConvertError, match="--format=gguf is unknown; use one of .*plain"):
        export_run(str(tmp_path / "run"), tmp_path / "no", format="gguf")
    assert not (tmp_path / "no").exists()


def test_other_models_as_plain_tensors(tmp_path):
    model = ClassifierConfig(classes=3, d_model=8, pattern="SdD", norm="layer")
    model.s4.d_state = model.dss.d_state = model.s4d.d_state = 4
    params = run_of(tmp_path / "run", ClassificationExperiment(model=model))
    with pytest.raises(ConvertError, match="of kind 'classification'.*--format=plain"):
        export_run(str(tmp_path / "run"), tmp_path / "out")
    export_run(str(tmp_path / "run"), tmp_path / "out", format="plain")
    expected = {"/".join(map(str, path)): value for path, value in params.items()}
    assert bits(read_all(tmp_path / "out")) == bits(expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["kind"] == "classification"
    export_run(str(tmp_path / "run"), tmp_path / "authors", format="state_space")
    theirs = read_all(tmp_path / "authors")
    assert theirs["layers.0.layer.kernel.inv_dt"].shape == (8, 1)
    W = expected["encoder/layers/1/mixer/W"]
    np.testing.assert_array_equal(theirs["layers.1.kernel.W"], W)


def test_adapters_are_merged_first(tmp_path):
    experiment = Experiment(lora=LoRAConfig(rank=2))
    run_record.save_config(tmp_path / "run", experiment.to_json())
    with pytest.raises(ConvertError, match=r"merge them first: python -m tools\.merge"):
        export_run(str(tmp_path / "run"), tmp_path / "out")

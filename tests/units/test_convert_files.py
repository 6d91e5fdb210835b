"""Bad published checkpoints: what is told, and that nothing is left behind."""

import argparse
import json
import pickle
import shutil
import sys
import types

import numpy as np
import pytest

from eval.opened import open_run
from models import published
from runtime import tensor_files
from tasks import bpe
from tests.published_checkpoints import (
    BF16,
    equal,
    refused,
    vectors,
    write_checkpoint,
    write_mamba2,
    write_tokenizer,
)
from tests.units.test_published_formats import MEGATRON, megatron
from tools.convert.importing import import_checkpoint
from tools.convert.published_files import PublishedFiles


@pytest.fixture
def copy(tmp_path):
    """A checkpoint to be damaged."""
    return write_mamba2(tmp_path / "copy")


def test_a_tokenizer_of_another_model_is_refused(copy, tmp_path):
    write_tokenizer(copy, size=70)
    refused(copy, tmp_path, "has 70 ids, but the model only 61")
    (copy / bpe.FILE).write_text("{}")
    refused(copy, tmp_path, r"tokenizer\.json is not a tokenizer.json: .*--tokenizer=none")


def test_pickles_are_read_without_running_them(tmp_path):
    torch = pytest.importorskip("torch")
    raw, weights, _ = vectors("hf_mamba2")
    directory, out = tmp_path / "bin", tmp_path / "out"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    file = directory / "pytorch_model.bin"
    torch.save({n: torch.tensor(w).to(torch.bfloat16) for n, w in weights.items()}, file)
    import_checkpoint(directory, out, dtype="float32")
    config = open_run(out).config.model
    rounded = {n: w.astype(BF16).astype(np.float32) for n, w in weights.items()}
    equal(open_run(out).params, published.params_from(config, rounded, "mamba2"))
    shutil.rmtree(out)

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'evil')!r}, 'w')",))

    file.write_bytes(pickle.dumps({"a": Evil()}))
    refused(directory, tmp_path, "pytorch_model.bin is refused: .*code in it is never run")
    torch.save({"backbone.embeddings.weight": Evil()}, file)
    refused(directory, tmp_path, "is refused")
    assert not (tmp_path / "evil").exists()


def damage(copy, how):
    first, file, *_ = sorted(copy.glob("*.safetensors"))
    index = copy / tensor_files.INDEX
    listed = json.loads(index.read_text())
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "header":
        file.write_bytes(b"garbage garbage")
    elif how == "shard":
        file.unlink()
    elif how == "outside":
        listed["weight_map"]["lm_head.weight"] = "../other.safetensors"
    elif how == "moved":
        name = next(n for n, f in listed["weight_map"].items() if f == file.name)
        listed["weight_map"][name] = first.name
    elif how == "index":
        listed = []
    if how in ("outside", "moved", "index"):
        index.write_text(json.dumps(listed))
    if how == "config":
        (copy / "config.json").unlink()
    if how == "json":
        (copy / "config.json").write_text("{")
    if how == "tensors":
        for file in copy.glob("*.safetensors*"):
            file.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"model-00002-of-0000\d\.safetensors \([\d,]+ bytes\) is truncated"),
        ("header", "is truncated or no safetensors file"),
        ("shard", r"lists files that are not beside it: model-00002-of-0000\d\.safetensors$"),
        ("outside", r"names '\.\./other\.safetensors'; the files of an index lie beside it"),
        ("moved", "lists tensors that are not in the files it says"),
        ("index", "is no index of tensors"),
        ("config", r"has no config\.json, .*found: model-00001"),
        ("json", r"config\.json is not JSON"),
        ("tensors", r"has no tensors; looked for model\.safetensors\.index\.json"),
    ],
)
def test_damaged_files(copy, tmp_path, how, message):
    damage(copy, how)
    refused(copy, tmp_path, message)


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    raw, weights, _ = vectors("hf_mamba2")
    weights["backbone.layers.1.mixer.d"] = weights.pop("backbone.layers.1.mixer.D")
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].copy()
    write_checkpoint(tmp_path / "bad", raw, weights)
    told = refused(tmp_path / "bad", tmp_path, "does not fit the model")
    for line in (
        "missing backbone.layers.1.mixer.D (8,); the nearest is backbone.layers.1.mixer.d",
        "unexpected backbone.layers.1.mixer.d",
        "lm_head.weight is (61, 31), expected (61, 32)",
    ):
        assert line in told
    write_checkpoint(tmp_path / "bad", raw | {"model_type": "rwkv"}, weights)
    refused(tmp_path / "bad", tmp_path, r"model_type='rwkv' is unknown; known are \['bamba', .*'mamba2'")
    weights["lm_head.weight"] = np.zeros((61, 32), np.int8)
    weights["backbone.layers.1.mixer.D"] = weights.pop("backbone.layers.1.mixer.d")
    write_checkpoint(tmp_path / "bad", raw, weights)
    refused(tmp_path / "bad", tmp_path, r"lm_head\.weight is of dtype int8; expected floating point")


def test_megatron_ranks_with_their_arguments(tmp_path, monkeypatch):
    """The arguments hold an enumeration of a package that is not installed."""
    torch = pytest.importorskip("torch")
    _, files, params = megatron(2)
    with monkeypatch.context() as patched:
        module = types.ModuleType("megatron.core.enums")
        module.ModelType = type("ModelType", (), {"__module__": module.__name__})
        for name in ("megatron", "megatron.core", module.__name__):
            patched.setitem(sys.modules, name, types.ModuleType(name))
        patched.setitem(sys.modules, module.__name__, module)
        arguments = argparse.Namespace(**MEGATRON, model_type=module.ModelType())
        for rank, file in enumerate(files):
            path = tmp_path / "iter" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            model = {n: torch.tensor(np.ascontiguousarray(w)) for n, w in file.items()}
            torch.save({"model": model, "args": arguments, "iteration": 7}, path)
    opened = PublishedFiles.open(tmp_path / "iter")
    assert opened.format == "megatron_hybrid" and "model_type" not in opened.raw
    for path, source in opened.sources.items():
        np.testing.assert_array_equal(source.read(opened.tensors.read), params[path], err_msg=str(path))

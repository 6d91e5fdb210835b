"""Tiny published checkpoints on disk, made of the golden files."""

import json

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file
from tokenizers.processors import TemplateProcessing

from runtime import tensor_files
from runtime.tensor_files import TensorFileError
from tasks import bpe
from tests.conftest import GOLDEN
from tools.convert.importing import import_checkpoint
from tools.convert.published_files import ConvertError

BF16 = ml_dtypes.bfloat16
DYNAMICS = ("A_log", "dt_bias", ".D")


def vectors(name):
    """Config, tensors and the rest of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        given = dict(archive)
    raw = json.loads(str(given.pop("__meta__")))["config"]
    return raw, {n[2:]: v for n, v in given.items() if n.startswith("w.")}, given


def write_checkpoint(directory, raw, weights, shards=1):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    entries = [(n, tensor_files.Entry(w.shape, w.dtype)) for n, w in weights.items()]
    limit = sum(w.nbytes for w in weights.values()) // shards + 1
    return tensor_files.write(directory, entries, weights.__getitem__, limit)


def write_tokenizer(directory, size=61, opening=False):
    """A tokenizer.json whose document ends with "</s>"; ``opening`` puts "<s>" before a text."""
    words = {"</s>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, size)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["</s>", "<s>"])
    if opening:
        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(directory / bpe.FILE))


def bfloat16(weights):
    """Matrices in bfloat16, dynamics in float32, as Mamba-2 is often published."""
    return {n: w if n.endswith(DYNAMICS) else w.astype(BF16) for n, w in weights.items()}


def bits(weights):
    return {name: (w.dtype.name, w.shape, w.tobytes()) for name, w in weights.items()}


def read_all(directory):
    """Every tensor of a checkpoint, as the library reads it."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def refused(source, tmp_path, match, **options):
    """The import raises, and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ConvertError, TensorFileError), match=match) as error:
        import_checkpoint(source, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before
    return str(error.value)


def equal(tree, expected):
    for path, value in nnx.traversals.flatten_mapping(expected).items():
        found = nnx.traversals.flatten_mapping(tree)[path]
        assert found.dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(found), value, err_msg=str(path))


def write_mamba2(directory):
    """Mamba-2 in several shards, with a tokenizer that opens texts."""
    raw, weights, _ = vectors("hf_mamba2")
    written = write_checkpoint(directory, raw, weights, shards=3)
    assert len(written) > 3 and written[-1].name == tensor_files.INDEX
    write_tokenizer(directory, opening=True)
    return directory

"""Runs that start from imported ones: a step of training, plug-ins, text, and what the tokenizer brings."""

import json

import jax
import numpy as np
import pytest

import train
from configs import beacon_stdlib, cca_plugin, finetune, hmt_plugin
from eval.generate import Generator
from eval.opened import open_run
from eval.sampling import Sampling
from eval.source_run import start_from
from models import published
from runtime import tree_diff
from tasks import bpe
from tests.published_checkpoints import vectors, write_checkpoint, write_tokenizer
from tools.convert.importing import import_checkpoint
from tools.prepare.__main__ import main as prepare

DEVICE = jax.devices()[:1]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
SETTINGS = {"eos_token": "w9", "bos_token": "<s>", "chat_template": TEMPLATE}


def llama():
    rng = np.random.default_rng(0)
    tensors = published.exported(published.config_from(LLAMA), "llama")
    return LLAMA, {t.name: rng.normal(scale=0.2, size=t.shape).astype("f4") for t in tensors}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A Llama and a Mamba-2 with a tokenizer whose documents end with "w9", imported."""
    root = tmp_path_factory.mktemp("imported")
    for name, (raw, weights) in (("llama", llama()), ("mamba2", vectors("hf_mamba2")[:2])):
        directory = root / f"{name}_published"
        write_checkpoint(directory, raw, weights)
        write_tokenizer(directory, opening=True)
        (directory / bpe.SETTINGS).write_text(json.dumps(SETTINGS))
        (directory / "chat_template.jinja").write_text(TEMPLATE)
        import_checkpoint(directory, root / name, seq_len=64)
    return root


@pytest.fixture(scope="module")
def corpus(runs):
    texts = runs / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(" ".join(f"w{2 + (i * j) % 50}" for j in range(300)))
    tokenizer = f"--tokenizer={runs / 'llama' / bpe.FILE}"
    options = [f"--source={texts}", tokenizer, "--eval_fraction=0.25", "--workers=1"]
    prepare([f"--out={runs / 'corpus'}", *options])
    return runs / "corpus"


def short(config, corpus):
    """One step on few tokens."""
    config.task.source, config.task.seq_len = str(corpus), 16
    config.task.batch_size = config.task.eval_batch_size = 2
    config.task.eval_batches = config.train.steps = 1
    config.mesh.fsdp = 1
    return config


@pytest.mark.parametrize("how", ["llama", "mamba2,lora"])
def test_one_step_of_training(runs, corpus, how, tmp_path):
    source = runs / how.partition(",")[0]
    config = short(finetune.get_config(f"{runs}/{how}"), corpus)
    config.lora.rank = 2 if config.lora.rank else 0
    train.run(config, tmp_path, DEVICE)
    before, tuned = tree_diff.leaves(open_run(source).params), open_run(tmp_path)
    after = tree_diff.leaves(tuned.params)
    assert tuned.step == 1
    if config.lora.rank:
        for path, value in before.items():
            np.testing.assert_array_equal(after[f"base/{path}"], value, err_msg=path)
        assert any(np.asarray(v).any() for path, v in after.items() if path.startswith("lora/"))
    else:
        assert all((np.asarray(after[path]) != value).any() for path, value in before.items())
    for name in (bpe.FILE, bpe.SETTINGS, "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    assert tuned.need_tokenizer().separator_id == 9
    (done,) = Generator(tuned).generate(["w5 w7"], Sampling(temperature=0.0), max_new_tokens=3)
    assert done.text == tuned.tokenizer.decode(done.ids) and len(done.ids) <= 3


@pytest.mark.parametrize(
    ("get_config", "arguments"),
    [(hmt_plugin.get_config, ",1"), (beacon_stdlib.get_config, ",32"), (cca_plugin.get_config, ",4,16")],
    ids=["hmt", "beacon", "cca"],
)
def test_plug_ins_start_from_it(runs, corpus, get_config, arguments, tmp_path):
    """Every parameter of the backbone is the imported one."""
    config, told = get_config(f"{runs / 'llama'}{arguments}"), []
    config.task.source, config.task.vocab_size, config.mesh.fsdp = str(corpus), None, 1
    s = train.setup(config, DEVICE)
    s.objective.prepare(tmp_path)
    state = start_from(config, s.model, s.init(jax.random.key(0)), tmp_path, told.append)
    found = tree_diff.leaves(state.params)
    for path, value in tree_diff.leaves(open_run(runs / "llama").params).items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert (tmp_path / bpe.SETTINGS).exists() and "start from" in told[0]

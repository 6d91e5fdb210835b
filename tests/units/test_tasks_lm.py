"""The language modelling task: batches, evaluation, loss and bits per byte."""

import dataclasses
import math
import pickle
import subprocess
import sys
import zlib

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import config_flags

from tasks.lm import LMTask, LMTaskConfig
from tasks.tokenizer import ByteTokenizer
from tasks.types import Task, combine_means, token_batch_spec

TEXT = ["def f(x):\n    return x\n" * n for n in (3, 9, 1, 30, 4, 12)]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXT):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    cache = str(tmp_path / "cache")
    return LMTaskConfig(
        source=str(tmp_path / "texts"), cache_dir=cache, seq_len=32, batch_size=4, eval_fraction=0.4
    )


def test_task_contract(config):
    task = LMTask(config)
    assert isinstance(task, Task) and task.vocab_size == 257
    spec = token_batch_spec(4, 32)
    for dataset in (task.train(), task.eval_sets()["validation"]):
        batch = dataset[0]
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (v.shape, v.dtype) for k, v in spec.items()
        }
    assert task.steps_per_epoch == math.ceil(task.training.targets / 128)
    assert task.train(slice(1, 3))[5]["tokens"].shape == (2, 32)
    assert task.eval_sets(slice(1, 3))["validation"][0]["tokens"].shape == (2, 32)


def test_another_process_gets_the_same_batch(config):
    code = (
        "import pickle, zlib; from tasks.lm import LMTask\n"
        f"batch = LMTask(pickle.loads({pickle.dumps(config)!r})).train()[17]\n"
        "print(zlib.crc32(b''.join(batch[k].tobytes() for k in sorted(batch))))"
    )
    batch = LMTask(config).train()[17]
    mine = zlib.crc32(b"".join(batch[k].tobytes() for k in sorted(batch)))
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(run.stdout) == mine


def test_evaluation_covers_held_out_targets_once_and_ignores_the_seed(config):
    task = LMTask(dataclasses.replace(config, eval_batch_size=2, eval_seq_len=16))
    dataset = task.eval_sets()["validation"]
    batches = [dataset[i] for i in range(len(dataset))]
    assert batches[0]["tokens"].shape == (2, 16)
    seen = np.sort(np.concatenate([b["targets"][b["weights"] > 0] for b in batches]))
    np.testing.assert_array_equal(seen, np.sort(task.validation.pairs()[1]))
    other = LMTask(dataclasses.replace(task.config, seed=9)).eval_sets()["validation"]
    np.testing.assert_array_equal(other[0]["tokens"], batches[0]["tokens"])
    limited = LMTask(dataclasses.replace(task.config, eval_batches=1)).eval_sets()["validation"]
    assert len(limited) == 1


def test_uniform_prediction_costs_its_entropy(config):
    task = LMTask(config)
    dataset = task.eval_sets()["validation"]
    nll = jnp.full((4, 32), math.log(257), jnp.float32)

    @jax.jit
    def metrics(batch):
        return task.metrics({"nll": nll}, batch)

    means = combine_means(metrics(dataset[i]) for i in range(len(dataset)))
    targets, documents = task.validation.targets, len(task.validation.lengths)
    assert means["loss"] == pytest.approx(math.log(257), rel=1e-5)
    # The ends of documents cost bits but are no bytes.
    assert means["bits_per_byte"] == pytest.approx(math.log2(257) * targets / (targets - documents), rel=1e-5)


def test_padding_does_not_enter_the_loss(config):
    task = LMTask(config)
    dataset = task.eval_sets()["validation"]
    last = dataset[len(dataset) - 1]
    assert (last["weights"] == 0).any()
    nll = jnp.where(last["weights"] > 0, 2.0, jnp.nan)
    total, weight = task.loss({"nll": nll}, last)
    assert float(total) == 2 * float(weight) == 2 * last["weights"].sum()
    assert np.isnan(combine_means([{"x": (jnp.zeros(()), jnp.zeros(()))}])["x"])


def test_token_array_batches_are_checked(tmp_path):
    ids = np.arange(1 << 17, dtype=np.uint32) % 100
    ids[100_000] = 100  # beyond the ids checked when the array is opened
    ids.tofile(tmp_path / "ids.bin")
    config = LMTaskConfig(source=str(tmp_path / "ids.bin"), token_dtype="uint32", seq_len=64, batch_size=16)
    with pytest.raises(
        ValueError, match=r"training batch \d+ \(\w+\) holds token ids .*task\.vocab_size=100"
    ):
        task = LMTask(dataclasses.replace(config, vocab_size=100))
        for step in range(task.steps_per_epoch):
            task.train()[step]
    task = LMTask(dataclasses.replace(config, vocab_size=101, bytes_per_token=4.0))
    assert task.tokenizer is None
    metrics = task.metrics({"nll": jnp.ones((16, 64))}, task.train()[0])
    assert combine_means([metrics])["bits_per_byte"] == pytest.approx(1 / math.log(2) / 4)
    plain = LMTask(dataclasses.replace(config, vocab_size=101))
    assert set(plain.metrics({"nll": jnp.ones((16, 64))}, plain.train()[0])) == {"loss"}


def test_too_little_data_for_a_batch(config):
    with pytest.raises(
        ValueError, match=r"fewer than one batch of task\.batch_size=400 x task\.seq_len=32 = 12800"
    ):
        LMTask(dataclasses.replace(config, batch_size=400))
    with pytest.raises(ValueError, match=r"task\.max_train_tokens"):
        LMTask(dataclasses.replace(config, max_train_tokens=100))
    with pytest.raises(ValueError, match=r"task\.eval_batches"):
        LMTask(dataclasses.replace(config, eval_batches=0))


def test_config_fields_can_be_overridden_from_the_command_line():
    flags = ["--task.source=x", "--task.vocab_size=7", "--task.carry_state=true", "--task.eval_batches=3"]
    arguments = ["program", *flags, "--task.bytes_per_token=4.5", "--task.max_train_tokens=9"]
    values = absl.flags.FlagValues()
    config_flags.DEFINE_config_dataclass("task", LMTaskConfig(), flag_values=values, sys_argv=arguments)
    values(arguments)
    task = values["task"].value
    assert (task.source, task.vocab_size, task.carry_state, task.eval_batches) == ("x", 7, True, 3)
    assert (task.bytes_per_token, task.max_train_tokens) == (4.5, 9)


def test_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve\n", separator=True)
    assert ids.dtype == np.int32 and ids[0] == 256 and len(ids) == 8
    assert tokenizer.decode([*ids, 256]) == "naïve\n"
    assert tokenizer.decode([0xFF]) == "\ufffd"
    with pytest.raises(ValueError, match=r"0\.\.256"):
        tokenizer.decode([257])

"""Published checkpoints to runs and back: what arrives, bit for bit, and what one of them generates."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from configs import finetune
from eval.generate import Generator
from eval.opened import open_run
from eval.sampling import Sampling
from models import published
from objectives import objective_of
from runtime import tensor_files
from runtime.mesh import MeshConfig, make_mesh
from runtime.tensor_files import TensorFiles
from tasks import bpe
from tests.published_checkpoints import (
    BF16,
    bfloat16,
    bits,
    equal,
    read_all,
    refused,
    vectors,
    write_checkpoint,
    write_mamba2,
    write_tokenizer,
)
from tools.convert import __main__ as command
from tools.convert import importing
from tools.convert.importing import import_checkpoint, mesh_of
from tools.convert.published_files import ConvertError, PublishedFiles


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Do not write to it."""
    return write_mamba2(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """The run that the command makes of it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    command.main(["import", f"--from={checkpoint}", f"--to={out}", "--mesh=fsdp=8"])
    return out


def test_every_parameter_arrives(run):
    raw, weights, _ = vectors("hf_mamba2")
    opened = open_run(run)
    equal(opened.params, published.params_from(opened.config.model, weights, "mamba2"))
    assert opened.step == 0 and opened.config.kind == "lm" and opened.config.task.vocab_size is None
    assert not list(run.parent.glob(".*"))


def test_generation_from_the_run_is_the_published_one(run):
    _, _, given = vectors("hf_mamba2")
    expected = given["greedy_tokens"]
    prompts = [row[:17].tolist() for row in given["input_ids"]]
    done = Generator.open(run).generate(prompts, Sampling(temperature=0.0), max_new_tokens=expected.shape[1])
    np.testing.assert_array_equal([completion.ids for completion in done], expected)
    assert [completion.finished for completion in done] == ["length"] * 2


def test_the_tokenizer_comes_along(run, checkpoint, tmp_path, capsys):
    tokenizer = open_run(run).need_tokenizer()
    assert (run / bpe.FILE).read_bytes() == (checkpoint / bpe.FILE).read_bytes()
    # Its own rule opens a text; "</s>" ends it.
    np.testing.assert_array_equal(tokenizer.encode("w5 w7", separator=True), [1, 5, 7])
    assert tokenizer.separator_id == 0 and tokenizer.decode([1, 5, 7, 0]) == "w5 w7"
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other, size=20)
    (other / bpe.SETTINGS).write_text(json.dumps({"eos_token": {"content": "w9"}}))
    import_checkpoint(checkpoint, tmp_path / "out", tokenizer=str(other))
    tokenizer = open_run(tmp_path / "out").need_tokenizer()
    assert tokenizer.separator_id == tokenizer.opening_id == 9 and not capsys.readouterr().out


def test_without_a_tokenizer_there_are_ids_only(checkpoint, tmp_path, capsys):
    import_checkpoint(checkpoint, tmp_path / "out", tokenizer="none")
    opened = open_run(tmp_path / "out")
    assert opened.tokenizer is None and opened.config.task.vocab_size == 61
    assert "reads and writes ids only" in capsys.readouterr().out
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(FileNotFoundError, match=r"task\.source is empty: .*tools\.prepare"):
        objective_of(opened.config, mesh)


def test_dtypes(tmp_path):
    raw, weights, _ = vectors("hf_mamba2")
    write_checkpoint(tmp_path / "mixed", raw, bfloat16(weights))
    write_checkpoint(tmp_path / "wide", raw, weights)
    for source, asked in (("mixed", None), ("wide", "bfloat16"), ("mixed", "float32")):
        opened = PublishedFiles.open(tmp_path / source)
        config = importing.compute_in(opened, asked)
        experiment = importing.experiment_of(opened, config, 64, with_text=False)
        params = importing.load(opened, experiment, mesh_of("fsdp=8"), asked)
        dtypes = {p[-1]: leaf.dtype for p, leaf in nnx.traversals.flatten_mapping(params).items()}
        assert dtypes["kernel"] == (np.float32 if asked == "float32" else BF16)
        assert dtypes["A_log"] == dtypes["dt_bias"] == dtypes["D"] == np.float32
        assert config.dtype == (asked or "bfloat16") and config.residual_dtype == "float32"
    refused(tmp_path / "wide", tmp_path, "--dtype=float16 is unknown", dtype="float16")


def test_parts_are_read_where_they_belong(checkpoint, monkeypatch):
    """Of a tensor that is split over four devices nothing larger than a quarter is read."""
    opened, largest = PublishedFiles.open(checkpoint, vocab_multiple=8), 0
    read = TensorFiles.read

    def watched(self, name, box):
        nonlocal largest
        value = read(self, name, box)
        if name == "backbone.embeddings.weight":
            largest = max(largest, value.size)
        return value

    monkeypatch.setattr(TensorFiles, "read", watched)
    experiment = importing.experiment_of(opened, opened.config, 64, with_text=False)
    params = importing.load(opened, experiment, mesh_of("fsdp=4,tensor=2"), None)
    table = params["embed"]["table"]
    assert largest == 61 * 32 // 4 and table.addressable_shards[0].data.shape == (64, 8)
    np.testing.assert_array_equal(table[:61], vectors("hf_mamba2")[1]["backbone.embeddings.weight"])
    assert not table[61:].any() and params["head"]["kernel"].shape == (32, 64)


def test_one_part_at_a_time_is_in_memory(monkeypatch):
    """A part is on its devices before the next is read; what several devices hold is read once."""
    seen, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *args: [seen.append("put"), put(*args)][1])
    whole = np.arange(16.0).reshape(8, 2)

    def values(box):
        seen.append("read")
        return whole[box]

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    array = importing.placed(whole.shape, sharding, values)
    assert seen == ["read", "put", "put"] * 4 and array.sharding == sharding
    np.testing.assert_array_equal(array, whole)


def test_other_runs_start_from_it(run):
    tuned = finetune.get_config(f"{run}@0,lora")
    assert tuned.init_from == f"{run}@0" and tuned.lora.rank and tuned.task.vocab_size is None
    tuned.validate()
    with pytest.raises(ValueError, match=r"expected RUN\[@STEP\] or RUN\[@STEP\],lora"):
        finetune.get_config(f"{run},head")


def test_authors_file_with_a_repeated_head(tmp_path):
    raw, weights, _ = vectors("orig_mamba")
    assert "lm_head.weight" in weights  # tied
    write_checkpoint(tmp_path / "tied", raw, weights)
    import_checkpoint(tmp_path / "tied" / tensor_files.WHOLE, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    equal(opened.params, published.params_from(opened.config.model, weights, "mamba_original"))
    weights["lm_head.weight"] = weights["lm_head.weight"] + np.eye(
        *weights["lm_head.weight"].shape, dtype="f4"
    )
    write_checkpoint(tmp_path / "untied", raw, weights)
    refused(tmp_path / "untied", tmp_path, r"lm_head\.weight differs from backbone\.embedding\.weight")


def test_what_is_there_stays(checkpoint, run, tmp_path):
    kept = (run / "config.json").read_bytes()
    with pytest.raises(ConvertError, match="is not empty"):
        import_checkpoint(checkpoint, run)
    assert (run / "config.json").read_bytes() == kept
    with pytest.raises(SystemExit, match="ConvertError: .* does not exist"):
        command.main(["import", f"--from={tmp_path / 'nothing'}", f"--to={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match="'rows=2' should be AXIS=SIZE with an axis of data, fsdp"):
        command.main(["import", f"--from={checkpoint}", f"--to={tmp_path / 'out'}", "--mesh=rows=2"])
    refused(checkpoint, tmp_path, "--mesh: .*3.* 8 devices", mesh=MeshConfig(data=1, fsdp=3))
    (tmp_path / ".out.unfinished").mkdir()  # of one that was killed
    import_checkpoint(checkpoint, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_round_trip_to_the_bit(run, checkpoint, tmp_path, capsys):
    command.main(["export", f"--from={run}", f"--to={tmp_path / 'again'}", "--shard_bytes=40000"])
    assert "in 21 tensors (float32), format mamba2" in capsys.readouterr().out
    assert len([*(tmp_path / "again").glob("*.safetensors")]) > 1
    assert bits(read_all(tmp_path / "again")) == bits(read_all(checkpoint))
    kept, again = (json.loads((d / "config.json").read_text()) for d in (checkpoint, tmp_path / "again"))
    assert again == kept | {"dtype": "float32"}
    assert (tmp_path / "again" / bpe.FILE).read_bytes() == (checkpoint / bpe.FILE).read_bytes()
    assert TensorFiles.open(tmp_path / "again").nbytes == sum(w.nbytes for w in read_all(checkpoint).values())

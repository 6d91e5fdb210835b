"""The training program: interruption, resumption, other meshes, carried state, and what bad input is told."""

import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

import train
from configs import overrides
from runtime.mesh import MeshConfig
from runtime.restore import ArchitectureError
from tests.experiments import tiny, write_corpus
from tests.several import losses, train_processes

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def run(experiment, workdir):
    """On as many devices as the mesh of the experiment has."""
    mesh = experiment.mesh
    size = mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence
    return train.run(experiment, workdir, jax.devices()[:size])


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Workdir of an uninterrupted run of 8 steps on one device."""
    workdir = tmp_path_factory.mktemp("finished")
    results = run(tiny(corpus), workdir)
    return workdir, results


def test_a_run_leaves_its_record(finished):
    workdir, results = finished
    assert results["step"] == 8 and 0 < results["validation/bits_per_byte"] < 9
    assert sorted(losses(workdir)) == list(range(1, 9))
    assert losses(workdir)[8] < losses(workdir)[1]
    assert (workdir / "loss.png").stat().st_size > 5000
    assert json.loads((workdir / "config.json").read_text())["model"]["pattern"] == "MM*-"
    assert json.loads((workdir / "result.json").read_text()) == results
    assert "dynamics" in (workdir / "parameters.txt").read_text()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "8"]


@pytest.mark.slow
def test_kill_9_and_sigterm_leave_the_loss_curve_as_it_was(corpus, tmp_path):
    config = f"tests/tiny_config.py:{corpus}"
    flags = ["--config.train.steps=30", "--config.checkpoint.every=5", "--config.model.pattern=M"]
    flags += ["--config.train.baselines=False", "--config.train.sample_length=0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def start(workdir, signal_at=""):
        return train_processes(1, config, workdir, *flags, signal_at=signal_at)[0]

    status, log = start(whole)
    assert status == 0, log
    status, log = start(broken, "0:13:SIGKILL")
    assert status == -signal.SIGKILL, log
    killed_at = max(losses(broken))
    assert 10 <= killed_at <= 13
    status, log = start(broken, "0:21:SIGTERM")
    assert status == 0 and "resuming" in log and "SIGTERM: saved step 22" in log, log
    status, log = start(broken)
    assert status == 0 and "from step 22" in log, log
    assert losses(broken) == losses(whole), "a resumed loss curve must be the same to the bit"


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 1, 1, 1)], ids=str)
def test_resume_on_another_mesh(corpus, tmp_path, saved_on_a_mesh, shape):
    shutil.copytree(saved_on_a_mesh, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    before = losses(tmp_path / "run")
    run(tiny(corpus, mesh=MeshConfig(*shape)), tmp_path / "run")
    after = losses(tmp_path / "run")
    assert sorted(after) == list(range(1, 9))
    np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def saved_on_a_mesh(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mesh")
    run(tiny(corpus, mesh=MeshConfig(1, 2, 2, 2)), workdir)
    return workdir


def test_resume_after_a_corrupt_newest_checkpoint(corpus, tmp_path, finished):
    shutil.copytree(finished[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "8"
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"")
    with pytest.warns(RuntimeWarning, match=r"step 8"):
        run(tiny(corpus), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(finished[0])
    assert newest.exists() and (tmp_path / "run" / "checkpoints" / "8.aside").exists()


def test_carried_state_with_accumulation_and_plateau(corpus, tmp_path):
    experiment = tiny(corpus)
    experiment.task.carry_state = True
    experiment.optim.accumulation = 2
    experiment.optim.schedule.kind = "plateau"
    experiment.train.eval_every = 3
    run(experiment, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "8")
    run(experiment, tmp_path / "part")
    assert losses(tmp_path / "part") == losses(tmp_path / "whole"), "the carried state must be resumed too"


def test_config_changes_are_told_on_resume(corpus, tmp_path, finished, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    experiment = tiny(corpus, steps=9)
    run(experiment, tmp_path / "run")
    assert "config changed since the last start: train.steps: 8 -> 9" in capsys.readouterr().out
    assert (tmp_path / "run" / "config.1.json").exists()


def test_checkpoint_of_another_architecture(corpus, tmp_path, finished):
    shutil.copytree(finished[0], tmp_path / "run")
    experiment = tiny(corpus)
    experiment.model.d_model = 48
    with pytest.raises(
        ArchitectureError, match=r"in_B/kernel: found float32\[2,32,32\], expected float32\[2,48,32\]"
    ):
        run(experiment, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["4", "8"]


def test_non_finite_loss_names_step_parameter_and_checkpoint(corpus, tmp_path):
    experiment = tiny(corpus, steps=40)
    experiment.optim.lr, experiment.optim.clip_norm = 1e25, None
    experiment.optim.schedule.warmup_steps = 20
    experiment.checkpoint.every = 1
    with pytest.raises(train.NonFiniteError, match=r"step \d+: loss .*; .*last good checkpoint is step \d+"):
        run(experiment, tmp_path / "run")


def with_field(corpus, field, value):
    experiment = tiny(corpus)
    *path, last = field.split(".")
    part = experiment
    for name in path:
        part = getattr(part, name)
    setattr(part, last, value)
    return experiment


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("task.source", "/no/such/place", "task.source.*/no/such/place"),
        ("task.batch_size", 0, "task.batch_size"),
        ("task.seq_len", 100_000, "task.seq_len"),
        ("model.pattern", "MX", "model.pattern='MX': unknown symbol 'X'; known symbols are"),
        ("model.pattern", "", "no layers"),
        ("model.mamba2.headdim", 7, "mamba2.headdim=7 does not divide the inner width 64"),
        ("model.vocab_size", 100, "model.vocab_size=100.*at least 257"),
        ("model.remat", "some", "model.remat='some'"),
        ("mesh.data", 3, "mesh.data=3"),
        ("train.steps", 0, "train.steps=0"),
        ("optim.schedule.kind", "cosin", "schedule.kind"),
        ("optim.accumulation", 3, "optim.accumulation"),
        ("task.eval_seq_len", 0, "eval_seq_len|seq_len"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_settings_that_cannot_work_are_named(corpus, field, value, message):
    with pytest.raises(train.ConfigError, match=f"(?s){message}"):
        train.setup(with_field(corpus, field, value), jax.devices()[:1])


def test_indivisible_mesh_names_the_field(corpus):
    experiment = tiny(corpus, mesh=MeshConfig(1, 1, 1, 8))
    experiment.task.seq_len = 36
    with pytest.raises(train.ConfigError, match=r"task.seq_len=36 must be a multiple of mesh.sequence=8; 40"):
        train.setup(experiment)


def test_indivisible_evaluation_names_the_field(corpus):
    experiment = tiny(corpus, mesh=MeshConfig(8))
    experiment.task.eval_batch_size = 12
    with pytest.raises(
        train.ConfigError, match=r"task.eval_batch_size=12 must be a multiple of 8 = mesh.data 8"
    ):
        train.setup(experiment)


def test_full_attention_cannot_be_carried(corpus):
    experiment = with_field(corpus, "task.carry_state", True)
    experiment.model.attention.window = None
    with pytest.raises(train.ConfigError, match="set model.attention.window"):
        train.setup(experiment, jax.devices()[:1])


def test_empty_corpus(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(train.ConfigError, match=r"task.source"):
        train.setup(tiny(tmp_path / "empty"), jax.devices()[:1])


def test_unknown_overrides_name_the_nearest_field(corpus):
    spec = f"--config={ROOT}/tests/tiny_config.py:{corpus}"
    overrides.check(
        ["train.py", spec, "--config.model.d_model=64", "--config.optim.groups.x=1", "--workdir=x"]
    )
    with pytest.raises(ValueError, match=r"no field 'model.d_modle'; did you mean model.d_model"):
        overrides.check(["train.py", spec, "--config.model.d_modle=64"])
    with pytest.raises(ValueError, match=r"no field 'lr'; did you mean optim.lr"):
        overrides.check(["train.py", spec, "--config.lr=1"])
    with pytest.raises(FileNotFoundError, match=r"there are .*quickstart.py"):
        overrides.check(["train.py", "--config=configs/quick.py", "--config.lr=1"])
    with pytest.raises(ValueError, match=r"^configs/lm_stdlib.py:rnn: unknown variant"):
        overrides.check(["train.py", f"--config={ROOT}/configs/lm_stdlib.py:rnn"])
    with pytest.raises(ValueError, match=r"^configs/continue_long.py:nowhere: there is no config.json"):
        overrides.check(["train.py", f"--config={ROOT}/configs/continue_long.py:nowhere"])


def test_every_field_can_be_set_from_the_command_line(corpus):
    """ml_collections reads the declared types, which postponed annotations would hide from it."""
    import dataclasses

    def check(part, name):
        for field in dataclasses.fields(part):
            assert not isinstance(field.type, str), f"{name}.{field.name} has a postponed annotation"
            if dataclasses.is_dataclass(getattr(part, field.name)):
                check(getattr(part, field.name), f"{name}.{field.name}")

    check(tiny(corpus), "config")

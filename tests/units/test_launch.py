"""Sweeps: rates, then seeds, then examinations; what ends badly or is interrupted loses nothing else."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from configs import trials
from configs.base import ConfigError
from configs.study import Arm, Examination, Study
from eval import run as examine
from eval.opened import load_config
from tests.experiments import write_corpus
from tests.fake_executor import Fake, write_run
from tools.launch import __main__ as command
from tools.launch import gather, plan, status
from tools.launch.local import LocalProcesses
from tools.launch.plan import Exam
from tools.launch.task import hold

EXAM = Examination(("bits_per_byte",))
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A config whose corpus nothing reads before training."""
    return f"tests/tiny_config.py:{tmp_path_factory.mktemp('data') / 'corpus'}"


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawn by the real study alone: they take longer than all else."""
    if "real" not in request.node.name:
        monkeypatch.setattr(command, "save_pictures", lambda *_: [])


def study_of(spec, *arms, **more):
    arms = arms or (
        Arm("a", spec, {"model.pattern": "-"}, {"task": "lm", "share": 0}, (1.0, 2.0, 4.0), seeds=(0, 1)),
        Arm("b", spec, {"model.pattern": "*"}, {"task": "lm", "share": 1}, rate_of="a", examinations=(EXAM,)),
    )
    return Study("small", "Is it?", "hybrid_ratio", arms, **more)


LOSSES = {"a/rate1_seed0": 2.0, "a/rate2_seed0": 1.5, "a/rate4_seed0": math.nan}


def test_rates_then_seeds_then_examinations_and_nothing_twice(spec, tmp_path):
    study = study_of(spec)
    fake = Fake(study, tmp_path, LOSSES, slots=2)
    outcomes = command.run(study, tmp_path, fake, QUIET)
    assert fake.commands[:3] == ["a/rate1_seed0", "a/rate2_seed0", "a/rate4_seed0"]
    assert set(fake.commands[3:]) == {"a/rate2_seed1", "b/rate2_seed0", "b/rate2_seed0/eval"}
    assert len(fake.commands) == study.runs + study.examinations and all(o.ok for o in outcomes.values())
    config = load = json.loads((tmp_path / "runs/a/rate2_seed1/config.json").read_text())
    assert config["optim"]["lr"] == 6e-3 and config["model"]["pattern"] == "-"
    assert config["train"]["seed"] == config["task"]["seed"] == 1 and load["name"] == "a"

    data = json.loads((tmp_path / "study.json").read_text())["data"]
    assert data["tried"] == {"a": {"1": 2.0, "2": 1.5, "4": "nan"}}
    assert [(r["arm"], r["seed"], r["rate"]) for r in data["records"]] == [
        ("a", 0, 2.0),
        ("a", 1, 2.0),
        ("b", 0, 2.0),
    ]
    assert data["records"][2]["probes"] == {"": {"bits_per_byte": {"answer": 42}}}
    assert (tmp_path / "study.html").exists()

    again = Fake(study, tmp_path)
    assert command.run(study, tmp_path, again, QUIET).keys() == outcomes.keys() and not again.commands


def test_a_failure_is_told_loses_nothing_else_and_is_tried_again(spec, tmp_path):
    study = study_of(spec)
    fake = Fake(study, tmp_path, LOSSES, fail=("a/rate2_seed0", "b/rate1_seed0/eval"))
    outcomes = command.run(study, tmp_path, fake, QUIET)
    assert "b/rate1_seed0/eval" in fake.commands, "the best of the rates that ended well"
    assert "exit code 1, results are missing: something broke" in outcomes["a/rate2_seed0"].why
    state = json.loads((tmp_path / "sweep.json").read_text())
    assert state["a/rate2_seed0"]["state"] == "failed" and state["a/rate1_seed0"]["seconds"] == 6.0
    notes = json.loads((tmp_path / "study.json").read_text())["notes"]
    assert any("a/rate2_seed0 failed: exit code 1" in note for note in notes)
    mended = Fake(study, tmp_path, LOSSES)
    command.run(study, tmp_path, mended, QUIET)
    assert mended.commands[0] == "a/rate2_seed0" and "b/rate2_seed0/eval" in mended.commands


def test_what_fails_is_tried_as_often_as_allowed_and_listed_with_its_error(spec, tmp_path):
    study = study_of(spec, *(Arm(name, spec, {"model.pattern": "-"}) for name in "abc"))
    fake = Fake(study, tmp_path, fail=["a/rate1_seed0"] + ["b/rate1_seed0"] * 3)
    console = Console(file=io.StringIO(), width=200)
    outcomes = command.run(study, tmp_path, fake, console, retries=2)
    assert sorted(fake.commands) == [f"{name}/rate1_seed0" for name in "aabbbc"]
    assert outcomes["a/rate1_seed0"].ok and outcomes["b/rate1_seed0"].failures == 3
    said = console.file.getvalue()
    assert "b/rate1_seed0 failed: exit code 1, results are missing: something broke" in said
    assert said.rstrip().count("tried 3 times") == 1
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["trial"], row["state"]) for row in rows] == [("a", "done"), ("c", "done"), ("b", "failed")]


def test_the_error_of_a_log_is_that_of_its_last_try(tmp_path):
    log = tmp_path / "log"
    first = "$ python train.py\nTraceback ...\nruntime.x.DataError: no file\n"
    log.write_text(first)
    assert status.error_of(log) == "runtime.x.DataError: no file"
    jax_says = "ValueError: bad shape\n--------------------\nFor simplicity, JAX has removed frames.\n"
    log.write_text(first + "$ python train.py\n" + jax_says)
    assert status.error_of(log) == "ValueError: bad shape"
    log.write_text(first + "$ python train.py\n")
    assert status.error_of(log) == "it said nothing"


def test_a_run_with_other_settings_is_refused_not_mixed(spec, tmp_path):
    arm = Arm("a", spec, {"model.pattern": "-"})
    study = study_of(spec, arm)
    command.run(study, tmp_path, Fake(study, tmp_path), QUIET)
    other = study_of(spec, Arm("a", spec, {"model.pattern": "-", "train.steps": 9}))
    fake = Fake(other, tmp_path)
    outcomes = command.run(other, tmp_path, fake, QUIET)
    assert not fake.commands and "train.steps: 8 -> 9" in outcomes["a/rate1_seed0"].why


def test_a_run_starts_from_that_of_its_source_with_the_same_seed(spec, tmp_path):
    longer = Arm(
        "longer",
        "configs/continue_long.py:{source},64",
        source="a",
        seeds=(0, 1),
        overrides={"task.packing": "stream"},
    )
    study = study_of(spec, Arm("a", spec, {"model.pattern": "M"}, seeds=(0, 1)), longer)
    fake = Fake(study, tmp_path)
    command.run(study, tmp_path, fake, QUIET)
    config = load_config(tmp_path / "runs/longer/rate1_seed1")
    assert config.init_from == str(tmp_path / "runs/a/rate1_seed1")
    assert (config.task.seq_len, config.task.seed, config.optim.lr) == (64, 1, pytest.approx(3e-4))


def test_an_interruption_stops_the_jobs_and_reports_what_there_is(spec, tmp_path):
    study = study_of(spec)

    class Interrupted(Fake):
        def ended(self):
            if len(self.commands) == 2:
                raise KeyboardInterrupt
            return super().ended()

    fake = Interrupted(study, tmp_path, LOSSES)
    with pytest.raises(KeyboardInterrupt):
        command.run(study, tmp_path, fake, QUIET)
    assert fake.stopped and "0 of 3 runs" in json.loads((tmp_path / "study.json").read_text())["notes"][0]


def test_a_dry_run_lists_commands_and_numbers(spec, tmp_path, capsys, monkeypatch):
    (tmp_path / "s.py").write_text(
        "from configs.study import *\n"
        f"def get_study(arg='x'):\n return Study(arg, '?', 'recall', (Arm('a', {spec!r}, rates=(1.0, 0.5), "
        "seeds=(0, 1), examinations=(Examination(('bits_per_byte',)),)),))\n"
    )
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    command.main([f"--sweep={tmp_path}/s.py:mine", f"--workdir={tmp_path}/w", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith(
        f"python train.py --config={spec} --workdir={tmp_path}/w/runs/a/rate0.5"
    )
    assert "--config.optim.lr=0.0015" in lines[1]
    assert lines[2].startswith("# mine: 3 trainings of 1 arms and 2 examinations, 0 done")
    assert not (tmp_path / "w").exists()


def test_an_examination_with_a_mitigation_has_its_own_place(spec, tmp_path):
    window = Examination(
        ("bits_per_byte",), ("length_extrapolation.rows=8",), ("model.attention.window=8",), "window"
    )
    (run,) = plan.jobs(study_of(spec, Arm("a", spec)), tmp_path, {})
    out = tmp_path / "runs/a/rate1_seed0/eval_window"
    assert Exam(run, window).argv == (
        *("-m", "eval.run", f"--workdir={run.workdir}", "--probes=bits_per_byte"),
        *("--set=length_extrapolation.rows=8", "--override=model.attention.window=8", f"--out={out}"),
    )


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "has no arms"),
        ([Arm("a", "x"), Arm("a", "x")], "arm name 'a' should be given once"),
        ([Arm("a/b", "x")], "without /"),
        ([Arm("a", "x", rates=(1.0, 1.0))], "arm a: rates="),
        ([Arm("a", "x", best="most")], "best='most'"),
        ([Arm("a", "x", rate_of="b")], "rate_of='b' is no arm before it"),
        ([Arm("a", "x:{source}")], "a source is read where"),
        ([Arm("a", "x", examinations=(EXAM, EXAM))], "should be different"),
        ([Arm("a", "x", examinations=(Examination(("p",), overrides=("q=1",)),))], "needs a name"),
    ],
)
def test_a_study_that_cannot_work_is_refused(arms, message):
    with pytest.raises(ConfigError, match=message):
        Study("s", "", "recall", tuple(arms)).validate()


def test_what_is_misspelt_is_answered_before_anything_runs(spec, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file configs/sweeps/no.py; there are configs/sw"):
        trials.load("configs/sweeps/no.py")
    for arm, message in (
        (Arm("a", spec, {"model.patern": "-"}), "arm a: 'model.patern=.*such as model.pattern"),
        (Arm("a", "configs/no.py"), "arm a: --config=configs/no.py: no file"),
        (Arm("a", spec, examinations=(Examination(("bits",)),)), "there is no probe 'bits'"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.run(study_of(spec, arm), tmp_path, Fake(None, tmp_path), QUIET)
    study = study_of(spec, Arm("a", spec, rates=(1.0, 2.0), metric="accuracy"), Arm("b", spec))
    outcomes = command.run(study, tmp_path, Fake(study, tmp_path), QUIET)
    assert "'accuracy' is not in the results; there are validation/loss" in outcomes["a/rate1_seed0"].why
    assert outcomes["b/rate1_seed0"].ok


def test_two_launchers_do_not_share_a_directory(spec, tmp_path):
    study = study_of(spec)
    with hold(tmp_path / "lock"), pytest.raises(ConfigError, match="lock is held: another launcher works"):
        command.run(study, tmp_path, Fake(study, tmp_path), QUIET)


@pytest.mark.slow
def test_a_real_study_in_processes(tmp_path, monkeypatch):
    """Two learning rates, the better really trained, in a process of its own, and really examined."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.top_pad=0")  # no second start with tuned malloc
    corpus = write_corpus(tmp_path / "corpus")
    small = {
        "model.pattern": "-",
        "model.d_model": 16,
        "task.batch_size": 2,
        "task.eval_batches": 1,
        "train.steps": 2,
        "optim.schedule.warmup_steps": 1,
        "checkpoint.every": 0,
    }
    arm = Arm(
        "a",
        f"tests/tiny_config.py:{corpus}",
        small,
        {"task": "lm", "share": 0},
        (1.0, 0.5),
        examinations=(EXAM,),
    )

    class Mixed(LocalProcesses):
        def _start(self, task):
            if task.name == "a/rate1_seed0":
                return super()._start(task)
            if task.name == "a/rate0.5_seed0":
                write_run(root / "runs" / task.name, plan.run_of(study, root, arm, 0.5, 0, {}).config, 9.0)
            else:
                examine.main(task.argv[2:])
            super()._start(dataclasses.replace(task, argv=("-c", "")))

    study, root = study_of("", arm), tmp_path / "study"
    outcomes = command.run(study, root, Mixed(2), QUIET)
    assert [end.why for end in outcomes.values()] == [""] * 3 and len(list(root.glob("pictures/*.png"))) == 1
    (record,) = gather.records(study, root, outcomes)
    again = record.probes[""]["bits_per_byte"]["validation/loss"]
    assert again == pytest.approx(record.result["validation/loss"], rel=1e-4)
    assert record.parameters > 0 and record.state_scalars == 0


def test_numbers_in_the_state_are_counted_as_the_paper_does(spec, tmp_path):
    study = study_of(spec, Arm("a", spec, {"model.pattern": "M*"}))
    (run,) = plan.jobs(study, tmp_path, {})
    mamba, attention = run.config.model.mamba2, run.config.model.attention
    inner = 2 * run.config.model.d_model
    ssm = inner * mamba.d_state + 3 * (inner + 2 * mamba.n_groups * mamba.d_state)
    caches = 2 * min(attention.window, run.config.task.seq_len) * attention.num_kv_heads * attention.head_dim
    assert gather.size_of(run.config)[1] == ssm + caches


@pytest.mark.parametrize(
    ("name", "task"), [("architectures_recall:cpu", "mqar"), ("layers_hybrid_ratio:cpu", "lm")]
)
def test_arms_that_are_compared_have_equal_parameters(name, task, tmp_path):
    study, _, preset = name.partition(":")
    study = trials.load(f"configs/sweeps/{study}.py:{preset}")
    arms = [arm for arm in study.arms if arm.factors["task"] == task]
    configs = [plan.run_of(study, tmp_path, arm, 1.0, 0, {}).config for arm in arms]
    counts = [gather.size_of(config)[0] for config in configs]
    assert len(counts) > 3 and max(counts) < 1.05 * min(counts)

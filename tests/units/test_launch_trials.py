"""Sweeps in their simple form: overrides, searches, and the table of both."""

import csv
import json

import pytest
from rich.console import Console

from configs import trials
from configs.base import ConfigError
from tests.experiments import write_corpus
from tests.fake_executor import Fake
from tools.launch import __main__ as command
from tools.launch.checks import check
from tools.launch.search import Search

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(command, "save_pictures", lambda *_: [])


@pytest.fixture
def sweep_file(tmp_path):
    """``sweep_file(body)`` writes a sweep over the tiny config and returns its path."""

    def write(body, head='METRIC = "validation/bits_per_byte"'):
        corpus = write_corpus(tmp_path / "corpus")
        path = tmp_path / "small.py"
        path.write_text(f'"""Is it?"""\nCONFIG = "tests/tiny_config.py:{corpus}"\n{head}\n{body}\n')
        return str(path)

    return write


GRID = """
def get_sweep(arg="one"):
    for lr in (0.001, 0.01):
        for layers in ("-", "*"):
            for seed in (1, 2):
                yield {"optim.lr": lr, "model.pattern": layers, "train.seed": seed, "train.steps": 2}
"""


def test_trials_are_named_by_what_is_swept_and_repeated_by_seeds(sweep_file):
    study = trials.load(sweep_file(GRID))
    assert [arm.name for arm in study.arms] == [
        "lr=0.001,pattern=-",
        "lr=0.001,pattern=_",
        "lr=0.01,pattern=-",
        "lr=0.01,pattern=_",
    ]
    assert study.runs == 8 and all(arm.seeds == (1, 2) for arm in study.arms)
    assert study.question == "Is it?" and study.arms[0].metric == "validation/bits_per_byte"
    check(study)


def test_one_table_and_a_report_that_compares(sweep_file, tmp_path, capsys):
    study = trials.load(sweep_file(GRID))
    losses = {f"lr=0.01,pattern=-/rate1_seed{seed}": 0.1 * seed for seed in (1, 2)}
    fake = Fake(study, tmp_path / "w", losses, slots=8)
    command.run(study, tmp_path / "w", fake, Console(width=200))
    rows = list(csv.DictReader((tmp_path / "w/results.csv").open()))
    assert len(rows) == 8 and {row["state"] for row in rows} == {"done"}
    assert [(row["trial"], row["seed"]) for row in rows[:2]] == [
        ("lr=0.01,pattern=-", "1"),
        ("lr=0.01,pattern=-", "2"),
    ]
    assert rows[0]["optim.lr"] == "0.01" and float(rows[0]["validation/loss"]) == 0.1
    assert "lr=0.01,pattern=-" in capsys.readouterr().out
    page = json.loads((tmp_path / "w/study.json").read_text())
    titles = [section["title"] for section in page["sections"]]
    assert titles[:3] == ["Trials", "By what was swept", "Comparison"] and titles[-1] == "Runs"
    assert page["sections"][0]["blocks"][0]["rows"][0][0] == "lr=0.01,pattern=-"
    assert [chart["title"] for chart in page["sections"][1]["blocks"]] == [
        "validation/bits_per_byte by optim.lr"
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def get_sweep():\n yield {'optim.lr': 0.1}\n yield {'optim.lrr': 0.2}", "optim.lrr=0.2.*optim.lr"),
        ("def get_sweep():\n yield {'model.d_model': 'wide'}", "model.d_model is 'wide', expected int"),
        ("def get_sweep():\n yield {'optim.lr': 'fast'}", "optim.lr is 'fast', expected float"),
        ("def get_sweep():\n yield {'train.steps': 0}", "train.steps=0 must be at least 1"),
        ("def get_sweep():\n yield ('optim.lr', 0.1)", "trial 1: .* should be a dict"),
        ("def get_sweep():\n yield {'optim.lr': {1}}", r"trial 1 .*optim.lr is \{1\}, a set"),
        ("def get_sweep():\n yield {'task.seed': 1}", "task.seed cannot be set: it follows train.seed"),
        ("def get_sweep():\n yield {}\n yield {}", "trial 2: there is a trial as_it_is already"),
        ("def get_sweep():\n return []", "has no arms"),
        ("def space(trial):\n return {}", "neither get_study.* only space"),
    ],
)
def test_what_cannot_run_is_told_before_the_first_trial(sweep_file, body, message):
    with pytest.raises(ConfigError, match=message):
        check(trials.load(sweep_file(body)))


def test_all_trials_that_cannot_run_are_told_at_once(sweep_file):
    body = "def get_sweep():\n for n in (1, 2, 3):\n  yield {'optim.beta': n} if n < 3 else {}"
    with pytest.raises(ConfigError, match="2 of 3 arms .* nothing was started\n.*beta=1.*\n.*beta=2"):
        check(trials.load(sweep_file(body)))


def test_a_file_that_does_not_say_over_what(sweep_file):
    with pytest.raises(ConfigError, match="the file should say over what"):
        trials.load(sweep_file("def get_sweep():\n yield {}", "del CONFIG"))


SPACE = """
def space(trial):
    return {"optim.lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True), "train.steps": 2}
"""


def test_a_search_finds_the_better_end_and_goes_on_where_it_stopped(sweep_file, tmp_path):
    path, root = sweep_file(SPACE), tmp_path / "w"

    class Learning(Fake):
        """The loss falls with the learning rate."""

        def _start(self, name, log):
            arm = self.study().arm(name.partition("/")[0])
            self.losses[name] = 1 / arm.overrides["optim.lr"]
            super()._start(name, log)

    def go(total, fail=()):
        search = Search(trials.space_of(path), root, total, ahead=2)
        fake = Learning(search.known, root, fail=fail, slots=2)
        command.run(search.known(), root, fake, QUIET, search=search, total=total)
        return search, fake.commands

    _, first = go(3, fail=["trial001/rate1_seed0"])
    assert [name[:8] for name in first] == ["trial000", "trial001", "trial002"]
    search, second = go(8)
    assert [name[:8] for name in second] == ["trial001", *(f"trial{n:03d}" for n in range(3, 8))]
    rates = [arm.overrides["optim.lr"] for arm in search.known().arms]
    assert len(set(rates)) == 8, "another seed at each start"
    rows = json.loads((root / "results.json").read_text())
    assert rows[0]["fields"]["optim.lr"] == max(rates) and len(rows) == 8
    assert search._study.best_params == {"lr": max(rates)}


def test_a_space_that_draws_an_unknown_field_is_refused(sweep_file, tmp_path):
    body = "def space(trial):\n return {'optim.lrr': trial.suggest_float('lr', 0.1, 1.0)}"
    with pytest.raises(ConfigError, match="optim.lrr.*such as optim.lr"):
        Search(trials.space_of(sweep_file(body)), tmp_path, 3, 1)
    assert not (tmp_path / "optuna.journal").exists()
    with pytest.raises(ConfigError, match="a search needs space"):
        trials.space_of(sweep_file(GRID))

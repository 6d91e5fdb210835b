"""Executors: how jobs end, what a killed launcher leaves, the same sweep here, through submitit, on Ray."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from configs import trials
from configs.base import ConfigError
from tools.launch import __main__ as command
from tools.launch import loop, plan
from tools.launch.cluster import SubmittedJobs
from tools.launch.executor import needed
from tools.launch.local import LocalProcesses
from tools.launch.task import Task, held, hold
from tools.launch.worker import Work

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)
SLEEP = ("-c", "import time; time.sleep(60)")


def until(look, seconds=60):
    """What ``look()`` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return seen


@pytest.fixture
def task(tmp_path):
    return lambda name, *argv: Task(name, argv or SLEEP, tmp_path / f"logs/{name}.log")


def test_processes_tell_how_they_ended_and_are_stopped(task):
    processes = LocalProcesses(2)
    bad = task("bad", "-c", "import sys; print('said'); sys.exit(3)")
    assert processes.start([bad, task("long")]) == []
    assert until(processes.ended) == {"bad": 3} and "said" in bad.log.read_text()
    process = processes._running["long"]
    assert os.getpgid(process.pid) == process.pid, "Ctrl-C is for the launcher alone"
    processes.stop()
    assert process.returncode == -signal.SIGTERM and processes.ended() == {} and not held(task("long").lock)


def test_what_a_killed_launcher_left_is_waited_for_and_stopped(task):
    killed = LocalProcesses(2)
    killed.start([task("long"), task("short", "-c", "import time; time.sleep(0.5)")])
    processes = LocalProcesses(2)
    assert processes.start([task("long"), task("short")]) == ["long", "short"]
    until(lambda: killed._running["short"].poll() is not None)
    assert until(processes.ended) == {"short": None} and held(task("long").lock)
    processes.stop()
    assert killed._running["long"].wait() == -signal.SIGTERM


def test_each_process_has_a_device_of_its_own(task):
    told = ("-c", "import os, sys; sys.exit(int(os.environ['CUDA_VISIBLE_DEVICES']))")
    processes = LocalProcesses(2, {"devices": "4,7"})
    processes.start([task("a", *told), task("b", *told)])
    codes = {}
    until(lambda: codes.update(processes.ended()) or len(codes) == 2)
    assert codes == {"a": 4, "b": 7}
    processes.start([task("c", *told)])
    assert until(processes.ended)["c"] in (4, 7)
    with pytest.raises(ConfigError, match="--jobs=2 needs as many devices"):
        LocalProcesses(2, {"devices": 0})
    with pytest.raises(ConfigError, match="--set gpus: --executor=local knows devices"):
        LocalProcesses(2, {"gpus": 1})


def test_work_has_its_job_leave_before_a_cluster_takes_the_machine_away(task, tmp_path):
    asked = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print('up'); time.sleep(60)"
    polite = task("polite", "-u", "-c", asked)
    work = Work(polite, str(tmp_path))

    def preempt(*_):
        work._process.send_signal(signal.SIGUSR2)  # as SLURM does, to every process
        again = work.checkpoint()
        assert again.function.task == polite

    def soon():
        until(lambda: work._process and "up" in polite.log.read_text().split())
        os.kill(os.getpid(), signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, preempt)
    thread = threading.Thread(target=soon)
    thread.start()
    try:
        assert work() == 5
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, before)


def test_a_worker_of_a_cluster_imports_next_to_nothing():
    heavy = "import sys, tools.launch.worker; sys.exit('numpy' in sys.modules or 'configs' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT).returncode == 0


SBATCH = """#!{python}
import pathlib, sys
pathlib.Path("{root}/sbatch").write_text(open(sys.argv[1]).read())
print("Submitted batch job 12")
"""
SACCT = "#!/bin/sh\nprintf 'JobID|State|NodeList\\n12_0|RUNNING|n1\\n12_1|COMPLETED|n1\\n'\n"


def test_slurm_is_given_one_array_and_its_jobs_are_found_again(task, tmp_path, monkeypatch):
    scripts = {
        "sbatch": SBATCH.format(python=sys.executable, root=tmp_path),
        "sacct": SACCT,
        "srun": "#!/bin/sh",
    }
    (tmp_path / "bin").mkdir()
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    settings = {"partition": "gpu", "gpus": 2, "time": 90, "qos": "long"}
    queue = SubmittedJobs(1000, 4, tmp_path, settings)
    assert queue.start([task("a"), task("b")]) == []
    asked = (tmp_path / "sbatch").read_text()
    for line in ("array=0-1%2", "partition=gpu", "gpus-per-node=2", "time=90", "qos=long", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in asked
    again = SubmittedJobs(1000, 4, tmp_path, settings)
    assert again.start([task("a")]) == ["a"], "it is in the queue"
    assert not again._take(task("b")), "it has ended"
    with pytest.raises(ConfigError, match="Unknown argument 'partitoin'"):
        SubmittedJobs(1, 1, tmp_path, {"partitoin": "gpu"})


def test_slurm_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="cluster='slurm': Could not detect \"srun\""):
        SubmittedJobs(1, 1, tmp_path, {})
    with pytest.raises(ConfigError, match=r"longspan_no is not installed: pip install -e '.\[slurm\]'"):
        needed("longspan_no", "slurm")


# A training of no time: it waits while there is a file "wait", and leaves the config that lies ready for it.
TRAIN = """
import json, pathlib, shutil, sys, time
flags = dict(argument.split("=", 1) for argument in sys.argv[1:])
name, workdir = flags["--config.name"], pathlib.Path(flags["--workdir"])
with open("starts", "a") as file:
    file.write(name + "\\n")
while pathlib.Path("wait").exists():
    time.sleep(0.02)
workdir.mkdir(parents=True)
shutil.copy(pathlib.Path("ready") / name, workdir / "config.json")
(workdir / "result.json").write_text(json.dumps({"step": 2, "validation/loss": len(name)}))
"""
SIX = """
CONFIG = "ROOT/tests/tiny_config.py:corpus"
def get_sweep():
    for d_model in (16, 32, 64):
        for steps in (2, 10):
            yield {"model.d_model": d_model, "train.steps": steps}
"""


@pytest.fixture
def six(tmp_path, monkeypatch):
    """Six trials of no time in a directory of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "save_pictures", lambda *_: [])
    monkeypatch.setattr(loop, "POLL", 0.02)
    pathlib.Path("train.py").write_text(TRAIN)
    pathlib.Path("six.py").write_text(SIX.replace("ROOT", str(ROOT)))
    pathlib.Path("ready").mkdir()
    study = trials.load("six.py")
    for run in plan.jobs(study, tmp_path, {}):
        (pathlib.Path("ready") / run.arm.name).write_text(run.config.to_json())
    return study


def started():
    path = pathlib.Path("starts")
    return path.read_text().split() if path.exists() else []


def states(root):
    return [row["state"] for row in json.loads((root / "results.json").read_text())]


def test_six_trials_interrupted_killed_and_resumed_end_with_one_table(six, tmp_path):
    root, wait = tmp_path / "sweep", pathlib.Path("wait")

    class Interrupted(LocalProcesses):
        """Ctrl-C as soon as two trials run."""

        before = 0

        def ended(self):
            until(lambda: len(started()) == self.before + 2)
            raise KeyboardInterrupt

    class Killed(Interrupted):
        before = 2

        def stop(self):
            """As if the launcher were no more."""

    wait.touch()
    for executor in (Interrupted(2), Killed(2)):
        with pytest.raises(KeyboardInterrupt):
            command.run(six, root, executor, QUIET)
        assert states(root) == ["not run"] * 6
    resumed = LocalProcesses(2)
    resumed_start = resumed.start
    found = []

    def start(tasks):
        found.extend(names := resumed_start(tasks))
        wait.unlink(missing_ok=True)
        return names

    resumed.start = start
    outcomes = command.run(six, root, resumed, QUIET)
    assert len(outcomes) == 6 and all(end.ok for end in outcomes.values()) and states(root) == ["done"] * 6
    assert len(found) == 2 and len(started()) == 2 + 2 + 4, "what the killed one left is not started again"
    assert len((root / "results.csv").read_text().splitlines()) == 7


def test_the_same_six_trials_through_submitit(six, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    root = tmp_path / "sweep"
    executor = command.executor_of("slurm", 3, root, ["cluster=local", "time=5"])
    outcomes = command.run(six, root, executor, QUIET)
    assert [end.why for end in outcomes.values()] == [""] * 6 and states(root) == ["done"] * 6
    assert sorted(started()) == sorted(arm.name for arm in six.arms)


def test_the_same_six_trials_on_ray(six, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # on a busy machine
    root = tmp_path / "sweep"
    try:
        outcomes = command.run(six, root, command.executor_of("ray", 3, root, ["cpus=0.1"]), QUIET)
    finally:
        ray.shutdown()
    assert [end.why for end in outcomes.values()] == [""] * 6 and states(root) == ["done"] * 6


@pytest.mark.parametrize(
    ("setting", "message"), [("gpus", "expected KEY=VALUE"), ("node=1", "--set node: --executor=ray knows")]
)
def test_settings_that_an_executor_does_not_know(setting, message, tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=message):
        command.executor_of("ray", None, tmp_path, [setting])


def test_a_lock_is_free_when_its_process_has_ended(tmp_path):
    with hold(tmp_path / "lock") as file:
        assert held(tmp_path / "lock") and hold(tmp_path / "lock") is None
        child = subprocess.Popen([sys.executable, *SLEEP], pass_fds=(file.fileno(),))
    assert held(tmp_path / "lock")
    child.kill()
    child.wait()
    assert not held(tmp_path / "lock")

"""benchmarks.ops: tiny calls measured in this process, the report, an earlier commit, options, work."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from benchmarks import chips, machine
from benchmarks.ops import __main__ as command
from benchmarks.ops import against, cases, report, run, static, worker
from benchmarks.ops.cases import BOTH, FORWARD, Case
from benchmarks.ops.peers import PEERS, TORCH
from benchmarks.workers import PeerFailed

SSD = Case("ssd", {"B": 1, "L": 8, "H": 2, "P": 4, "N": 4, "G": 1, "Q": 4})
SCAN = Case("linear_scan", {"B": 1, "L": 8, "D": 4})


class Here:
    """``benchmarks.workers.Process`` without a process."""

    def __init__(self, name, tuned_malloc, platforms="cpu"):
        self.name = name

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731

    def call(self, function, *args):
        if function is against.use:
            return None
        try:
            return function(*args)
        except (ImportError, NotImplementedError) as error:
            raise PeerFailed(f"{self.name}: {error}") from error


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Process", Here)
        patch.setattr(against, "checkout", lambda commit: contextlib.nullcontext())
        patch.setattr(run, "CPU_QUICK", (SSD, SCAN))
        patch.setattr(worker, "SAMPLE_SECONDS", 1e-3)
        plan = run.Plan(quick=True, repeats=2, against="HEAD")
        return plan, run.run(plan, note=lambda text: None)


def test_a_run(found):
    plan, taken = found
    assert taken.platform == "cpu"
    who = {(r.op, r.what, r.who) for r in taken.records}
    assert {("ssd", FORWARD, name) for name in ("reference", "xla", "xla at HEAD")} < who
    assert ("ssd", BOTH, "xla") in who and ("ssd", BOTH, "reference") not in who
    assert {("linear_scan", BOTH, name) for name in ("xla", "associative_scan", "xla at HEAD")} < who
    assert not any(name in ("interpret", "pallas_tpu") for *_, name in who)
    assert all(len(r.samples) == 2 and r.median > 0 and (r.differs or 0) < 1e-5 for r in taken.records)
    why = {(item["case"], item["who"]): item["why"] for item in taken.left_out}
    assert why[str(SSD), "mamba_ssm"] == "runs on cuda only"


def test_the_report(found, tmp_path):
    plan, taken = found
    call = (SSD.op, dict(SSD.shape), SSD.dtype)
    evidence = [
        static.Evidence(*call, "v5e", BOTH, "pallas_tpu", 1500, 1e-3, 10**6, 1e-3, 2**20),
        static.Evidence(*call, "v6e", BOTH, "pallas_tpu", error="no [x]"),
    ]
    results = report.results(plan, taken, machine.describe(), chips.Peak(1e11, 1e10), evidence)
    assert json.loads(json.dumps(results))["records"]
    one = next(r for r in results["records"] if (r["op"], r["who"], r["what"]) == ("ssd", "xla", FORWARD))
    assert one["bound_by"] == "memory" and one["of_roofline"] == one["bound_seconds"] / one["median"]
    others = {t["claim"].rpartition(" over ")[2] for t in results["targets"]}
    assert others == {"xla at HEAD", "associative_scan"}
    text = io.StringIO()
    report.show(results, Console(file=text, width=250))
    for expected in ("at least", "1,500", "no [x]", "Not slower than", "nothing was run"):
        assert expected in text.getvalue()
    report.plot(results, tmp_path / "ops.png")
    assert (tmp_path / "ops.png").stat().st_size > 10_000


def test_ours_must_not_fail_and_others_may(monkeypatch):
    monkeypatch.setattr(run, "Process", Here)
    monkeypatch.setattr(worker, "SAMPLE_SECONDS", 1e-3)

    def broken(case, who, what):
        raise NotImplementedError("out of order")

    contest = run._Contest(run.Plan(), SCAN, run.Found("cpu"), print, {run.OURS: Here(run.OURS, True)})
    assert contest._ask("associative_scan", FORWARD, run.OURS, broken) is None
    assert contest.found.left_out[0]["why"] == "longspan: out of order"
    with pytest.raises(PeerFailed):
        contest._ask("xla", FORWARD, run.OURS, broken)


def test_torch_computes_the_same():
    pytest.importorskip("torch")
    for case in (SSD, Case("causal_conv1d", {"B": 1, "L": 6, "C": 4, "K": 3})):
        theirs, ours = (worker.start(case, who, BOTH) for who in ("torch", "xla"))
        assert theirs.differs_from(ours) < 1e-5 and theirs.compile_seconds is None
    worker.forget()
    assert {p.framework for by_op in PEERS.values() for p in by_op.values()} == {"jax", TORCH}


def test_an_earlier_commit_is_what_gets_imported(tmp_path):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *args], cwd=tmp_path, check=True)

    (tmp_path / "pallas_kernels").mkdir()
    (tmp_path / "pallas_kernels" / "__init__.py").write_text("THIS = 'then'\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "then")
    with pytest.raises(ValueError, match="--against=nowhere: "):
        against.resolve("nowhere", tmp_path)
    commit = against.resolve("HEAD", tmp_path)
    with against.checkout(commit, tmp_path) as folder:
        code = "import pallas_kernels, pathlib, sys; from benchmarks.ops import against;"
        code += "against.use(pathlib.Path(sys.argv[1])); import pallas_kernels; import benchmarks.ops.cases;"
        code += "print(pallas_kernels.THIS)"
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, cwd=against.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "then\n"


def test_work_against_the_published_counts():
    """Those of specs of Mamba-2 2.7B at 8192 tokens: bytes of the convolution and FLOPs of attention."""
    conv = Case("causal_conv1d", {"B": 1, "L": 8192, "C": 5376, "K": 4}, "bfloat16").work(FORWARD)
    assert conv.bytes == pytest.approx(176e6, rel=1e-2) and conv.flops == 2 * 4 * 8192 * 5376
    ssd = Case("ssd", {"B": 1, "L": 8192, "H": 80, "P": 64, "N": 128, "G": 1, "Q": 256}, "bfloat16")
    assert ssd.work(FORWARD).flops == pytest.approx(43.5e9, rel=1e-2)
    assert ssd.work(FORWARD).bytes == pytest.approx(175e6, rel=2e-2)
    backward = ssd.work(BOTH).flops - ssd.work(FORWARD).flops
    assert backward == pytest.approx(98e9, rel=1e-2)
    bound = chips.PEAKS["v5p"].bound(ssd.work(FORWARD))
    assert bound.by == "compute" and bound.seconds == pytest.approx(0.095e-3, rel=1e-2)
    assert chips.peak_of_kind("TPU v5 lite") is chips.PEAKS["v5e"] and chips.peak_of_kind("cpu") is None


def test_every_case_can_be_called():
    for case in {c.op: c for c in (*cases.CPU, *cases.ACCELERATOR)}.values():
        sizes = {axis: min(size, 8) for axis, size in case.shape.items()}
        small = Case(case.op, sizes, case.dtype)
        work = small.work(FORWARD)  # traces the op
        assert work.flops > 0 and work.bytes > 0
        arrays = small.arrays()
        assert {n: a.shape for n, a in arrays.items()} == {n: i.shape for n, i in small.inputs.items()}
        assert all(np.isfinite(a.astype(np.complex64)).all() for a in arrays.values())


def test_options(capsys):
    given = command.options(["--quick", "--ops=ssd,attention", "--chips=none"])
    assert given.ops == ["ssd", "attention"] and given.chips == [] and given.quick
    assert command.options([]).chips == ["v5e", "v5p", "v6e"]
    for wrong in ("--ops=conv", "--chips=v9", "--against=no-such-commit"):
        with pytest.raises(SystemExit):
            command.options([wrong])
        assert wrong.partition("=")[2] in capsys.readouterr().err

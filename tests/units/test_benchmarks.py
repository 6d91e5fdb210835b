"""Benchmarks: timing, the plan, the report, and ours measured at a tiny size; no peer package is needed."""

import dataclasses
import importlib.util
import io
import json
import os
import sys

import jax
import numpy as np
import pytest
from absl import flags
from rich.console import Console

from benchmarks import lm, machine, peers, report, tables, timing, workers, workload
from benchmarks import run as runs
from benchmarks.plan import Job, Plan, Record
from benchmarks.run import Run
from benchmarks.timing import Stopwatch, Timing
from runtime.host import TUNABLES

SHAPE = workload.Shape(vocab_size=16, d_model=32, headdim=8, d_state=16, chunk_size=8)


def test_first_call_is_apart_and_samples_are_long_enough():
    clock = [0.0]
    durations = iter([5.0, *[0.25] * 100])

    def call():
        clock[0] += next(durations)

    watch = Stopwatch(call, min_seconds=1.0, now=lambda: clock[0])
    assert watch.warm_up() == 5.0
    start = clock[0]
    assert watch.sample() == 0.25 and clock[0] - start == 1.0
    summary = Timing(5.0, (0.2, 0.4, 0.3))
    assert summary.median == 0.3 and summary.compile == pytest.approx(4.7)


def test_record_counts_decoded_tokens():
    record = Record.create(Job("peers", "longspan", "decode", 100), Timing(1.0, (0.64,)), batch=2)
    assert record.samples == (0.64 / peers.DECODE_STEPS,)
    assert record.tokens_per_second == pytest.approx(2 * peers.DECODE_STEPS / 0.64)
    record = Record.create(Job("peers", "longspan", "train", 100), Timing(1.0, (0.5,)), batch=2)
    assert record.samples == (0.5,) and record.tokens_per_second == 400


def test_disagreeing_samples_are_marked():
    job = Job("scaling", "longspan", "prefill", 8192)
    calm = Record.create(job, Timing(1.0, (1.0, 1.1, 1.05, 9.0, 1.0)), batch=1)
    busy = Record.create(job, Timing(1.0, (1.0, 2.0, 1.5, 4.0, 3.0)), batch=1)
    assert calm.steady and not busy.steady
    run = Run(Plan(SHAPE))
    for record in (calm, busy):
        run.records = [record]
        found = report.results(run, machine.describe(), dict.fromkeys(FLOORS, 1e9))
        assert [t["steady"] for t in found["targets"]] == [record.steady]
        text = io.StringIO()
        tables.show(found, Console(file=text, width=200))
        assert ("(!)" in text.getvalue()) != record.steady


def test_published_weights_are_those_of_our_model():
    model, params = workload.build(SHAPE)
    weights = workload.published_weights(SHAPE)
    assert weights["1.in_proj"].shape == (2 * SHAPE.d_inner + 2 * SHAPE.d_state + SHAPE.heads, SHAPE.d_model)
    count = sum(p.size for p in jax.tree.leaves(params))
    assert sum(w.size for w in weights.values()) == count
    single = workload.published_weights(dataclasses.replace(SHAPE, n_layers=1))
    assert single["0.A_log"].shape == (SHAPE.heads,)


def test_state_carries_over_pieces_in_decoding():
    """Decoding after a context fed in pieces goes on as greedy choice over one pass does."""
    peer = peers.PEERS["longspan"].load()(SHAPE)
    context = workload.random_tokens(SHAPE, 20)
    taken, prepared = [], peer._prepared()
    call = peer._decoding(context, lambda c: taken.append(np.asarray(c[0])) or peer._step(prepared, c), 8)
    for _ in range(3):
        call()
    sequence = np.concatenate([context, np.stack(taken, axis=1)], axis=1)
    expected = peer.logits(sequence[:, :-1]).argmax(-1)[:, context.shape[1] - 1 :]
    np.testing.assert_array_equal(sequence[:, context.shape[1] :], expected)


def test_plain_torch_computes_our_logits_and_decodes():
    torch = pytest.importorskip("torch")
    ours = peers.PEERS["longspan"].load()(SHAPE)
    peer = peers.PEERS["torch-ssd"].load()(SHAPE)
    tokens = workload.random_tokens(SHAPE, 21)
    expected = ours.logits(tokens)
    np.testing.assert_allclose(peer.logits(tokens), expected, atol=1e-5)
    with torch.inference_mode():
        ids = torch.tensor(tokens, dtype=torch.int64)
        _, state = peer.apply(ids[:, :18], None, True)
        for i in range(18, 21):
            logits, state = peer.apply(ids[:, i : i + 1], state, True)
            np.testing.assert_allclose(logits[:, 0], expected[:, i], atol=1e-5)


def test_a_run_without_peers_names_them_and_their_command(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    absent = ("torch", "transformers", "mamba2_jax")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in absent else found(n, *a))
    monkeypatch.setattr(machine, "floors", lambda shape: dict.fromkeys(FLOORS, 1e9))
    plan = Plan(
        dataclasses.replace(SHAPE, n_layers=1),
        ("train", "decode"),
        lengths=(8,),
        contexts=(8,),
        repeats=2,
        checked=8,
    )
    results = lm.measure(plan, Console(file=io.StringIO()))
    path = lm.write(results, str(tmp_path / "lm.json"))
    assert json.loads(path.read_text())["plan"]["lengths"] == [8]

    text = io.StringIO()
    tables.show(results, Console(file=text, width=200))
    assert "torch and transformers not installed: pip install -e '.[bench]'" in text.getvalue()
    assert "mamba2-jax not installed: pip install -e '.[bench]'" in text.getvalue()
    absent = {"transformers", "torch-ssd", "mamba2-jax"}
    assert set(results["failures"]) == absent | {f"{name}:tuned-malloc" for name in absent}
    measured = {(r["part"], r["what"], r["length"]) for r in results["records"]}
    assert measured == {
        *(("peers", what, 8) for what in ("train", "decode", "decode_calls")),
        ("contexts", "decode", 8),
    }
    assert all(len(r["samples"]) == 2 and r["median"] > 0 for r in results["records"])
    assert results["carried_bytes"] > 0 and results["peak_bytes"]["longspan"] > 0
    assert results["machine"]["cores"] >= 1 and results["machine"]["versions"]["jax"] == jax.__version__


FLOORS = ("matmul_flops", "memory_bytes_per_second", "weights_bytes_per_second")


def test_a_failing_peer_is_left_out(monkeypatch):
    class Broken:
        def __init__(self, name, shape):
            self.name = name

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731
        logits = lambda self, n: np.zeros((1, n, 2))  # noqa: E731
        peak_bytes = lambda self: 1  # noqa: E731
        ask = lambda self, method: 7  # noqa: E731
        forget = lambda self: None  # noqa: E731

        def start(self, what, length):
            if self.name == "mamba2-jax" and what == "prefill":
                raise runs.PeerFailed("mamba2-jax: RuntimeError: out of order")
            return None if what == "decode_calls" else 2.0

        def sample(self, what, length):
            return 1.0 if self.name.startswith("longspan") else 30.0

    monkeypatch.setattr(runs, "Worker", Broken)
    monkeypatch.setattr(peers.Entry, "missing", lambda self: None)
    run = Run(Plan(SHAPE, repeats=3))
    run.everything()
    assert run.failures == {"mamba2-jax": "mamba2-jax: RuntimeError: out of order"}
    timed = {(r.peer, r.what) for r in run.records if r.part == "peers"}
    assert ("mamba2-jax", "train") in timed and ("mamba2-jax", "decode") not in timed
    assert ("transformers", "decode") in timed and ("transformers", "decode_calls") not in timed
    found = report.results(run, machine.describe(), dict.fromkeys(FLOORS, 1e9))
    claims = {t["claim"]: t for t in found["targets"]}
    training = claims["training, 4096 tokens: times faster than transformers"]
    assert training["found"] == 30 and training["met"]
    growth = claims["train: cost of 65536 tokens over 8192"]
    assert growth["found"] == 1 and growth["wanted"] == 10 and growth["met"]
    assert not claims["prefill, 4096 tokens: share of the matmul rate"]["met"]


def test_each_process_has_the_malloc_its_peer_asks_for(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    seen = {}
    for tuned in (True, False):
        with workers._malloc(tuned):
            seen[tuned] = os.environ.get("GLIBC_TUNABLES")
    assert seen == {True: TUNABLES if sys.platform == "linux" else None, False: None}
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0"
    assert {name: e.tuned_malloc for name, e in peers.PEERS.items() if "jax" in name} == {
        "mamba2-jax": False,
        "mamba2-jax:tuned-malloc": True,
    }


def test_ours_is_not_forgiven(monkeypatch):
    def refuse(name, shape):
        raise runs.PeerFailed(f"{name}: ImportError: no")

    monkeypatch.setattr(runs, "Worker", refuse)
    with pytest.raises(runs.PeerFailed, match="longspan"):
        Run(Plan(SHAPE, peers=())).everything()


def test_flags_make_the_plan_and_refuse_unknown_names():
    flags.FLAGS(["lm", "--lengths=16,32", "--peers=transformers", "--what=train", "--quick", "--chunk=64"])
    plan = lm.plan_from_flags()
    assert (plan.lengths, plan.peers, plan.what) == ((16, 32), ("transformers",), ("train",))
    assert plan.repeats == 3 and plan.shape.chunk_size == 64
    flags.FLAGS(["lm", "--peers=jamba"])
    with pytest.raises(lm.app.UsageError, match="jamba"):
        lm.plan_from_flags()
    flags.FLAGS(["lm", "--peers=transformers", "--lengths=4k"])
    with pytest.raises(lm.app.UsageError, match="4k"):
        lm.plan_from_flags()


def test_rates_and_units():
    assert machine.read_rate(2**16, repeats=1) > 1e6
    assert [tables.seconds(t) for t in (2.0, 0.0456, 7.89e-4)] == ["2 s", "45.6 ms", "789 us"]
    assert timing.measure(lambda: None, 2, min_seconds=1e-4).median >= 0

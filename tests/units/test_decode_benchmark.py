"""benchmarks.decode and benchmarks.roofline: a tiny run of the one, the table of the other, pictures."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks import decode, machine, roofline
from benchmarks.ops import report, static
from benchmarks.ops.cases import ACCELERATOR_QUICK, BOTH, FORWARD


def test_decoding_a_hybrid_after_a_context(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "read_rate", lambda size, repeats: 1e9)
    watch = decode.Stopwatch
    monkeypatch.setattr(decode, "Stopwatch", lambda call: watch(call, min_seconds=1e-3))
    plan = decode.Plan(("hybrid",), batches=(2,), contexts=(4, 8), d_model=64, repeats=2)
    notes = []
    records = decode.run(plan, notes.append)
    assert [(r.model, r.batch, r.context) for r in records] == [("hybrid", 2, 4), ("hybrid", 2, 8)]
    assert all(len(r.samples) == 2 and r.median > 0 and r.floor == r.bytes / 1e9 for r in records)
    # Four more tokens of keys and values: two rows of 64 float32 numbers each.
    assert records[1].bytes - records[0].bytes == 4 * 2 * 2 * 64 * 4
    assert not decode.targets(records)  # attention may grow
    flat = [decode.Record("mamba2", 1, n, 0.0, (t,), 8, 1.0) for n, t in ((1024, 1.0), (8, 2.0))]
    assert [(t["found"], t["met"]) for t in decode.targets(flat)] == [(0.5, True)]

    found = decode.results(plan, records, machine.describe())
    text = io.StringIO()
    decode.show(found, Console(file=text, width=200))
    assert "hybrid M-*-" in text.getvalue()
    decode.plot(found, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 10_000


def test_a_context_is_as_if_it_had_been_read():
    decoder = decode.Decoder("*-", 32, batch=1, context=6)
    before = decoder.carry[1]
    assert before["position"] == 5 and before["segment"] == 1
    (length,) = [n for p, n in jax.tree_util.tree_leaves_with_path(before) if decode._name(p) == "length"]
    assert length == 6
    counters = jax.tree.map(jnp.copy, {name: before[name] for name in ("position", "segment")})
    decoder.call()
    after = decoder.carry[1]
    assert all((after[name] == counters[name]).all() for name in counters)
    written = [n for p, n in jax.tree_util.tree_leaves_with_path(after) if decode._name(p) == "k"]
    assert (written[0][0, :6] == 0).all() and (written[0][0, 6:] != 0).any()


def test_roofline_table_and_picture(tmp_path):
    rows = roofline.bounds(ACCELERATOR_QUICK)
    conv = next(row for row in rows if row["op"] == "causal_conv1d" and row["what"] == FORWARD)
    assert conv["ms"]["v5e"] == pytest.approx(0.215, abs=1e-3) and conv["by"]["v5e"] == "memory"
    text = io.StringIO()
    Console(file=text, width=250).print(roofline.bounds_table(rows))
    assert "0.215 M" in text.getvalue()
    case = ACCELERATOR_QUICK[0]
    call = (case.op, dict(case.shape), case.dtype, "v5e", BOTH)
    evidence = [
        static.Evidence(*call, "pallas_tpu", 10**6, 0.66, 10**9, 1.2, 2**20),
        static.Evidence(*call, "xla", bytes=4 * 10**9, bytes_ms=4.9),
    ]
    found = {
        "bounds": rows,
        "static": [report.with_bound(e) for e in evidence],
        "machine": machine.describe(),
    }
    roofline.plot(found, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_options(capsys):
    for command, wrong in ((decode, "--models=rwkv"), (roofline, "--chips=v9"), (roofline, "--ops=conv")):
        with pytest.raises(SystemExit):
            command.main([wrong])
        assert repr(wrong.partition("=")[2]) in capsys.readouterr().err

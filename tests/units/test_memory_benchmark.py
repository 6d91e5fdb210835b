"""benchmarks.memory: a tiny run, what grew how much, the table and the picture."""

import dataclasses
import io

import pytest
from rich.console import Console

from benchmarks import machine, memory, memory_report


@pytest.fixture(scope="module")
def record():
    return memory.run(memory.Plan(("attention",), (32,), piece=16, repeats=1), lambda text: None)[0]


def test_a_model_at_a_length(record):
    assert len(record.prefill) == 1 and len(record.decode) == 3 and min(record.prefill + record.decode) > 0
    assert record.state == 2 * 2 * 32 * 64 * 4 + 2 * 4 + 8  # keys and values of two layers, and counters
    assert 0 < record.forward < record.gradient
    seen = [n * (n + 1) / 2 for n in (32, 31)]  # keys of all queries
    own = 4 * 64 * 2 * 32  # of a token that sees 32 keys in two layers
    rest = record.flops - 4 * 64 * 2 * seen[0]
    assert record.step_flops == pytest.approx(own + rest / 32)


def test_growth_and_report(record, tmp_path):
    longer = dataclasses.replace(
        record, length=64, prefill=(8 * record.prefill[0],), flops=4 * record.flops, state=2 * record.state
    )
    plan = memory.Plan(("attention",), (32, 64), piece=16, repeats=1)
    found = memory.results(plan, [record, longer], machine.describe())
    (growth,) = found["growth"]
    assert (growth["length"], growth["flops"], growth["state"], growth["forward"]) == (2, 4, 2, 1)
    assert growth["prefill"] == 8 and not growth["prefill_as_counted"] and growth["decode_as_counted"]
    text = io.StringIO()
    memory_report.show(found, Console(file=text, width=200))
    assert "8.00x" in text.getvalue() and "d_model 64" in text.getvalue()
    untimed = [dataclasses.replace(r, prefill=(), decode=()) for r in (record, longer)]
    for records in (untimed, [record, longer]):
        memory_report.plot(memory.results(plan, records, found["machine"]), tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000

"""What the benchmark of generation makes of its measurements; nothing is timed."""

import pytest
from rich.console import Console

from benchmarks import generate
from benchmarks.peers import OURS
from benchmarks.plan import Plan, Record
from benchmarks.run import Run
from benchmarks.workload import Shape

SHAPE = Shape(vocab_size=16, d_model=64, n_layers=1, d_state=8)
FLOORS = {"matmul_flops": 1e9, "weights_bytes_per_second": 1e9}


def measured(peer, what, *samples):
    return Record("peers", peer, what, 512, 0.0, samples, 0.0)


@pytest.mark.parametrize("busy", [False, True])
def test_sides_floors_and_ratios(busy):
    run = Run(Plan(SHAPE, lengths=(512,)))
    run.records = [
        measured(OURS, "prefill", 2.0, 2.0),
        measured(OURS, "decode", 0.01, 0.01),
        measured(generate.PEER, "prefill", 8.0, 80.0 if busy else 8.0),
        measured(generate.PEER, "decode", 0.04, 0.04),
    ]
    machine = {"cpu": "a CPU", "cores": 2, "load_1min": 0.0, "date": "today"}
    found = generate.results(run, FLOORS, machine, new=100)
    assert found["seconds"][OURS] == {"prefill": 2.0, "decode": 1.0, "both": 3.0}
    assert found["floors"]["decode"] == pytest.approx(100 * 4 * found["shape"]["parameters"] / 1e9)
    assert found["times"]["decode"] == pytest.approx(4.0)
    assert found["met"] is not busy
    console = Console(record=True, width=120)
    generate.show(found, console)
    assert ("the machine was busy" in console.export_text()) is busy


def test_without_transformers_ours_stands_alone():
    run = Run(Plan(SHAPE, lengths=(512,)))
    run.records = [measured(OURS, "prefill", 2.0), measured(OURS, "decode", 0.01)]
    run.failures["transformers"] = "transformers not installed"
    machine = {"cpu": "a CPU", "cores": 2, "load_1min": 0.0, "date": "today"}
    found = generate.results(run, FLOORS, machine, new=100)
    assert not found["met"] and found["times"] == {}
    generate.show(found, Console(quiet=True))

"""The benchmark of the generators on a stand-in, and the pictures."""

import io
import json

import numpy as np
from PIL import Image
from rich.console import Console

from benchmarks import generators
from benchmarks.results_file import write
from tools import grid


def test_blocks_follow_each_other_and_are_averaged(monkeypatch, tmp_path):
    clock, calls = [0.0], []

    def make(start, stop):
        calls.append((start, stop))
        clock[0] += (stop - start) * 0.001 * len(calls)

    monkeypatch.setattr(generators.time, "process_time", lambda: clock[0])
    stand_in = generators.Generator("stand-in", make, block=10, blocks=3, public_ms=30.0, target_ms=None)
    record = generators.measure(stand_in, quick=False)
    assert calls == [(0, 1), (1, 11), (11, 21), (21, 31)]
    assert record["examples"] == 30
    np.testing.assert_allclose((record["ms"], record["error"]), (3, 1 / 3**0.5))  # of 2, 3 and 4
    found = {"cpu": "A CPU", "cores": 2, "load_1min": 0.5, "date": "2026-01-02T03:04+00:00"}
    results = {"benchmark": "generators", "machine": found, "records": [record]}
    text = io.StringIO()
    generators.show(results, Console(file=text, width=120))
    assert "3.00 ± 0.58" in text.getvalue() and "30" in text.getvalue()
    monkeypatch.setattr("benchmarks.results_file.RESULTS", tmp_path)
    path = write(results, None)
    assert path.name == "generators_2026-01-02_a-cpu-2-cores.json"
    assert json.loads(path.read_text()) == results


def test_every_generator_makes_what_it_says():
    for generator in generators.generators():
        if generator.name not in ("Pathfinder 64", "Pathfinder 128 (Path-X)"):  # seconds for one
            made = generator.make(3, 5)
            fields = made.values() if isinstance(made, dict) else [made]
            assert all(len(field) == 2 for field in fields)


def test_pictures(tmp_path):
    out = tmp_path / "grid.png"
    grid.main(["--out", str(out), "--resolutions", "32", "--difficulty", "easy", "--columns", "2"])
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 200 and pixels.std() > 10

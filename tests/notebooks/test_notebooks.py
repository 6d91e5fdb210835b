"""The notebooks: every source runs at smoke size, and what is kept of a larger run belongs to it."""

import json
import os
import re
import subprocess
import sys

import pytest

from tools import notebooks

nbformat = pytest.importorskip("nbformat")
NAMES = notebooks.names()
KEPT = sorted(path.stem for path in notebooks.SOURCES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """By name: what ``worker.py`` says of each."""
    directory = tmp_path_factory.mktemp("notebooks")
    environment = {
        **os.environ,
        "NOTEBOOK_SIZE": "smoke",
        "MPLBACKEND": "agg",
        "PYTHONPATH": str(notebooks.ROOT),
    }
    environment["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0"  # one device: a tiny batch does not divide
    )
    sources = [str(notebooks.SOURCES / f"{name}.py") for name in NAMES]
    worker = [sys.executable, str(notebooks.ROOT / "tests/notebooks/worker.py"), "found.json", *sources]
    done = subprocess.run(
        worker, cwd=directory, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((directory / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_source_runs(ran, name):
    assert not ran[name]["problem"], ran[name]["problem"]
    assert ran[name]["figures"] >= 1


@pytest.mark.parametrize("name", KEPT)
def test_a_pair_agrees(name):
    kept = nbformat.read(notebooks.SOURCES / f"{name}.ipynb", as_version=4)
    nbformat.validate(kept)
    ours, theirs = ([(c.cell_type, c.source) for c in nb.cells] for nb in (notebooks.read(name), kept))
    assert ours == theirs, f"make notebooks, or python -m tools.notebooks {name}"


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_of_a_run(name):
    kept = nbformat.read(notebooks.SOURCES / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in kept.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs
    )
    assert not re.search(r"/(home|root|tmp|Users|usr)/", text)


def test_the_first_cell_is_the_same_in_all():
    first = {next(c.source for c in notebooks.read(name).cells if c.cell_type == "code") for name in NAMES}
    assert len(first) == 1 and "COLAB_RELEASE_TAG" in first.pop()


def test_a_notebook_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match="there is no notebook 'tuor'; there are .*tour"):
        notebooks.read("tuor")


def test_outputs_are_tidied():
    new = nbformat.v4.new_output
    outputs = [
        new("stream", name="stdout", text="a\n"),
        new("stream", name="stderr", text="a library warns\n"),
        new("display_data", {"text/plain": "b", "text/html": "<pre>b</pre>"}),
        new("display_data", {"text/plain": "<Figure>", "image/png": "AAAA"}),
    ]
    tidied = notebooks.tidy(outputs)
    assert [o.output_type for o in tidied] == ["stream", "display_data"] and tidied[0].text == "a\nb\n"

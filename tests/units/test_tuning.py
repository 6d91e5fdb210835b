"""The table of block sizes: which entry a call gets, and what a broken table says."""

import json
import logging

import jax.numpy as jnp
import pytest

from benchmarks import tune
from benchmarks.ops.cases import ACCELERATOR, Case
from pallas_kernels import tuning
from pallas_kernels.tuning import MEASURED, STATIC, Entry

DEFAULT = {"chunk": 64, "heads": 4}
SHAPE = {"L": 3000, "H": 24, "P": 64}


def entry(chip, length, chunk, op="ssd", dtype="bfloat16", **shape):
    where = {} if length is None else {"L": length}
    return Entry(chip, op, where | shape, dtype, {"chunk": chunk}, STATIC, "2026-01-31")


ENTRIES = (
    entry("v5e", 2048, 1, H=24),
    entry("v5e", 8192, 2, H=24),
    entry("v5e", 8192, 3, H=80),
    entry("v5e", None, 4),
    entry("tpu", None, 5),
    entry("cuda", None, 6),
    entry("v5p", None, 7, dtype="float32"),
)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(tuning, "table", lambda: ENTRIES)
    tuning._say_once.cache_clear()


@pytest.mark.parametrize(
    "chip, shape, dtype, chunk",
    [
        ("v5e", {"L": 3000, "H": 24}, "bfloat16", 1),  # the nearest length in ratio
        ("v5e", {"L": 4096, "H": 24}, "bfloat16", 1),  # of two equally near the shorter
        ("v5e", {"L": 5000, "H": 24}, "bfloat16", 2),
        ("v5e", {"L": 1, "H": 80}, "bfloat16", 3),  # however far
        ("v5e", {"L": 8192, "H": 16}, "bfloat16", 4),  # an entry that does not care about H
        ("v5p", {"L": 8192, "H": 24}, "bfloat16", 5),  # nothing for the chip: the generic entry
        ("h100", {"L": 8192, "H": 24}, "bfloat16", 5),  # a TPU kernel on a host with a GPU
        ("v5p", {"L": 8192}, "float32", 7),
        ("v5e", {"L": 8192, "H": 24}, "float32", 64),  # nothing: the default
    ],
)
def test_which_entry_a_call_gets(table, chip, shape, dtype, chunk):
    with tuning.chip(chip):
        assert tuning.blocks("ssd", shape, dtype, DEFAULT) == {"chunk": chunk, "heads": 4}


def test_the_chip_is_that_of_the_device_or_generic(table, monkeypatch):
    assert tuning.blocks("ssd", SHAPE, jnp.bfloat16, DEFAULT)["chunk"] == 5  # this host has no TPU
    assert tuning.blocks("ssd", SHAPE, jnp.bfloat16, DEFAULT, platform="cuda")["chunk"] == 6
    for kind, chip in {
        "TPU v5 lite": "v5e",
        "TPU v5p": "v5p",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "v7x",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "cpu": None,
    }.items():
        assert tuning.chip_of_kind(kind) == chip
    with pytest.raises(ValueError, match="chip 'v9' is unknown; use one of v4, v5e"), tuning.chip("v9"):
        pass


def test_forced_sizes_win(table):
    with tuning.chip("v5e"), tuning.forced("ssd", {"heads": 9}), tuning.forced("other", {"rows": 2}):
        assert tuning.blocks("ssd", SHAPE, "bfloat16", DEFAULT) == {"chunk": 64, "heads": 9}
    assert tuning.blocks("ssd", SHAPE, "bfloat16", DEFAULT)["heads"] == 4


def test_what_kernels_ask_for_can_be_listened_to(table):
    with tuning.questions() as asked:
        tuning.blocks("ssd", SHAPE, jnp.bfloat16, DEFAULT)
    tuning.blocks("ssd", SHAPE, jnp.bfloat16, DEFAULT)
    assert asked == [tuning.Question("ssd", SHAPE, "bfloat16", DEFAULT, "tpu")]


def test_an_untuned_default_is_said_once_and_only_for_a_chip(table, caplog):
    with caplog.at_level(logging.INFO, "longspan.kernels"):
        tuning.blocks("conv", SHAPE, "float32", DEFAULT)
        assert not caplog.records
        with tuning.chip("v6e"):
            for _ in range(2):
                tuning.blocks("conv", SHAPE, "float32", DEFAULT)
    assert len(caplog.records) == 1
    assert "conv: no tuned block sizes for v6e at {'L': 3000" in caplog.records[0].message


GOOD = {
    "chip": "v5e",
    "op": "ssd",
    "shape": {"L": 8},
    "dtype": "bfloat16",
    "blocks": {"chunk": 8},
    "source": MEASURED,
    "date": "2026-01-31",
}


@pytest.mark.parametrize(
    "rows, message",
    [
        ("[{]", "t.json: not JSON: Expecting property name .* line 1"),
        ({}, "t.json: holds dict; expected a list"),
        ([3], "entry 0: is 3; expected an object"),
        (
            [GOOD | {"block": 8}],
            r"entry 0 \(v5e ssd bfloat16 {'L': 8}\): unknown field 'block'; expected chip",
        ),
        ([{k: v for k, v in GOOD.items() if k != "date"}], "entry 0 .*: the field 'date' is missing"),
        ([GOOD | {"chip": "v9"}], "chip is 'v9'; expected one of v4"),
        ([GOOD | {"blocks": {"chunk": -8}}], "blocks is {'chunk': -8}; expected positive"),
        ([GOOD | {"blocks": {}}], "blocks is {}; expected positive"),
        ([GOOD | {"shape": {"L": 8.5}}], "shape is {'L': 8.5}; expected positive"),
        ([GOOD | {"source": "guess"}], "source is 'guess'; expected 'static cycles' or 'measured'"),
        ([GOOD | {"date": "yesterday"}], "date is 'yesterday'; expected a date"),
        ([GOOD, GOOD | {"ms": 1.0}], "entries 0 and 1 are both for v5e ssd bfloat16 L=8"),
    ],
)
def test_a_broken_table_names_the_entry(tmp_path, rows, message):
    path = tmp_path / "t.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        tuning.read(path)


def test_an_entry_with_a_block_size_the_op_does_not_have(table):
    with (
        tuning.chip("v5e"),
        pytest.raises(ValueError, match="entry v5e ssd bfloat16 sets 'chunk', which ssd does not have"),
    ):
        tuning.blocks("ssd", {"L": 8, "H": 16}, "bfloat16", {"rows": 8})


def test_write_and_read_again(tmp_path):
    path = tmp_path / "t.json"
    tuning.write(ENTRIES, path)
    assert set(map(str, tuning.read(path))) == set(map(str, ENTRIES))
    tuning.write((), path)
    assert tuning.read(path) == ()


def test_the_table_that_comes_with_the_package_is_good():
    assert isinstance(tuning.read(tuning.PATH), tuple)


CASE = Case("ssd", {"B": 1, "L": 256, "H": 8, "P": 64, "N": 64, "G": 2, "Q": 128}, "bfloat16")
QUESTION = tuning.Question(
    "ssd", {"B": 1, "L": 256, "H": 8, "G": 2}, "bfloat16", {"chunk": 128, "heads": 4}, "tpu"
)


def test_the_search_varies_one_size_after_the_other():
    assert tune.candidates(QUESTION) == {"chunk": [128, 256, 512], "heads": [2, 4]}
    tried = []

    def time(case, blocks):
        tried.append(tuple(blocks.values()))
        if blocks["chunk"] == 512:
            raise RuntimeError("RESOURCE_EXHAUSTED: too much VMEM")
        return 1000 / blocks["chunk"] + blocks["heads"]

    notes = []
    assert tune.search(CASE, QUESTION, time, notes.append) == ({"chunk": 256, "heads": 2}, 1000 / 256 + 2)
    assert tried == [(128, 4), (256, 4), (512, 4), (256, 2)]
    assert any("left out: RESOURCE_EXHAUSTED" in note for note in notes)


def test_tuning_resumes_and_static_evidence_replaces_no_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "question_of", lambda case, chip: QUESTION if case.op == "ssd" else None)
    path, calls = tmp_path / "t.json", []

    cases = (CASE, Case("long_conv", {"B": 1, "L": 8, "H": 2}))

    def fill(source, again=False, ms=1.0):
        calls.clear()
        time = lambda case, blocks: calls.append(1) or ms  # noqa: E731
        return tune.fill(path, cases, "v5e", source, time, again, lambda text: None)

    (first,) = fill(STATIC)
    assert first.shape == {"L": 256, "H": 8, "G": 2} and first.source == STATIC and calls
    assert not fill(STATIC) and not calls  # there already
    assert fill(STATIC, again=True)
    (second,) = fill(MEASURED, ms=2.0)  # a measurement replaces static evidence
    assert [e.source for e in tuning.read(path)] == [MEASURED] and second.ms == 2.0
    assert not fill(STATIC, again=True) and not calls
    assert not fill(MEASURED)


def test_what_the_kernels_of_the_package_ask(tmp_path):
    for case in ACCELERATOR:
        question = tune.question_of(case, "v5e")
        if question is not None:
            assert set(question.shape) <= set(case.shape) and all(tune.candidates(question).values())
    assert tune.question_of(CASE, "h100") is None or tuning.CHIPS["h100"] == "cuda"

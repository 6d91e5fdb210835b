"""Metric writers: valid JSON, cut back on resume, nothing lost."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog

from runtime.writers import JsonlWriter, open_writers, to_json


def read(path):
    return [json.loads(line, parse_constant=lambda name: 1 / 0) for line in path.read_text().splitlines()]


def read_events(logdir):
    """Events of each file, oldest first: frames of (length u64, crc u32, payload, crc u32)."""
    for path in sorted(logdir.iterdir(), key=lambda p: (p.stat().st_mtime_ns, p.name)):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16


def test_values_become_valid_json():
    values = {
        "jax": jnp.float32(1.5),
        "bf16": jnp.bfloat16(0.5),
        "numpy": np.int64(3),
        "vector": np.array([1.0, np.nan]),
        "nan": float("nan"),
        "inf": -np.float32("inf"),
        "nested": {"a": (jnp.array(True), "text", None)},
    }
    assert to_json(values) == {
        "jax": 1.5,
        "bf16": 0.5,
        "numpy": 3,
        "vector": [1.0, "nan"],
        "nan": "nan",
        "inf": "-inf",
        "nested": {"a": [True, "text", None]},
    }
    assert type(to_json(values)["numpy"]) is int


def test_jsonl_is_flushed_and_appended(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    for step in (1, 2):
        writer = JsonlWriter(path)
        writer.write(step, {"loss": jnp.float32(step)})
        assert [r["step"] for r in read(path)] == list(range(1, step + 1)), "before closing"
        writer.close()
    record = read(path)[-1]
    assert list(record) == ["step", "time", "loss"] and record["loss"] == 2.0


def test_jsonl_where_files_cannot_grow(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        writer = JsonlWriter(path, append=False)
        writer.write(step, {"loss": 1.0})
        writer.close()
    assert [r["step"] for r in read(path)] == [1, 2]
    writer = JsonlWriter(path, append=False)
    writer.cut(1)
    writer.write(5, {})
    assert [r["step"] for r in read(path)] == [1], "held back"
    monkeypatch.setattr("runtime.writers.REWRITE_EVERY", 0.0)
    writer.write(6, {})
    assert [r["step"] for r in read(path)] == [1, 5, 6]
    writer.close()


def test_cut_moves_later_records_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in (10, 20, 30, 20):  # an evaluation's record follows the step's
        writer.write(step, {"loss": step})
    with path.open("a") as file:
        file.write('{"step": 35, "lo')  # killed while writing
    writer.cut(20)
    assert [r["step"] for r in read(path)] == [10, 20, 20]
    cut = (tmp_path / "metrics.cut1.jsonl").read_text().splitlines()
    assert json.loads(cut[0])["step"] == 30 and cut[1] == '{"step": 35, "lo'
    writer.write(30, {"loss": 0})
    writer.cut(30)
    assert not (tmp_path / "metrics.cut2.jsonl").exists(), "nothing to cut"
    writer.cut(10)
    assert [r["step"] for r in read(tmp_path / "metrics.cut2.jsonl")] == [20, 20, 30]
    writer.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.cut1.jsonl",
        "metrics.cut2.jsonl",
        "metrics.jsonl",
    ]


def test_tensorboard_after_a_cut_purges(tmp_path):
    writers = open_writers(tmp_path)
    writers.write(10, {"loss": jnp.float32(2), "note": "text", "bad": float("nan")})
    writers.close()
    writers = open_writers(tmp_path)
    writers.cut(10)
    writers.write(11, {"loss": 1.0})
    writers.close()
    events = list(read_events(tmp_path / "tensorboard"))
    scalars = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert scalars[("loss", 10)] == 2.0 and scalars[("loss", 11)] == 1.0 and ("note", 10) not in scalars
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [11]
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl")] == [10, 11]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    writers = open_writers(tmp_path / "run")
    writers.write(1, {"loss": 1.0})
    writers.cut(0)
    writers.close()
    assert not (tmp_path / "run").exists()


def test_wandb_is_imported_only_when_asked_for_and_resumes(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        run = types.SimpleNamespace(id="abc")
        run.define_metric = lambda *a, **k: None
        run.log = lambda record: calls.append(record)
        run.finish = lambda: calls.append("finish")
        calls.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        writers = open_writers(tmp_path, wandb_project="long", config='{"lr": 1}')
        writers.write(3, {"loss": jnp.float32(1)})
        writers.close()
    first, record, finish, second = calls[:4]
    assert first == {"project": "long", "id": None, "resume": "allow", "config": {"lr": 1}}
    assert record == {"step": 3, "loss": 1.0} and finish == "finish" and second["id"] == "abc"

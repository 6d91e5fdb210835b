"""Reports: one page that needs nothing else, from runs in any state; what is bad is named."""

import html.parser
import json
import math
import re

import jax
import numpy as np
import pytest

import train
from configs.saved import from_json
from eval import report
from eval.opened import RunError
from eval.report import charts, words
from eval.report.__main__ import main
from eval.report.document import Chart, Report, Section, Series, Table
from eval.report.gather import read_run
from eval.report.groups import Statistic, group_runs, running_mean, thin_out
from eval.report.lines import learning_curves
from models.functional import Functional, parameter_count
from models.lm import LM
from runtime import run_record
from tests.experiments import tiny, write_corpus

VOID = {"meta", "rect", "path", "polygon", "br", "link", "img"}


class Page(html.parser.HTMLParser):
    """Checks that elements close in order; collects ids, links, text, and what charts are called."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.ids, self.links, self.charts, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "iframe", "link", "img"), f"<{tag}> needs something else"
        assert "src" not in attributes
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if attributes.get("role") == "img":
            self.charts.append(attributes["aria-label"])
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.text += data.replace(words.GLUE, " ")


def write_run(directory, *, name="small", seed=0, lr=0.001, steps=40, until=40, loss=2.0, rows=8, **files):
    """A run as a training of ``until`` steps out of ``steps`` leaves it."""
    directory.mkdir(parents=True)
    config = {
        "name": name,
        "model": {"pattern": "M-*-", "d_model": 32},
        "task": {"source": "stdlib", "batch_size": rows, "seq_len": 32, "seed": seed},
        "optim": {"lr": lr},
        "train": {"steps": steps, "seed": seed},
    }
    (directory / "config.json").write_text(json.dumps(config))
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, until + 1):
            record = {"step": step, "time": 1.0 * step, "train/bits_per_byte": loss + 5 / step}
            record |= {"seconds/step": 0.1 * step, "seconds/total": 5 + 0.1 * step}
            record |= {"speed/tokens_per_second": 1000.0, "speed/mfu": 0.25}
            file.write(json.dumps(record) + "\n")
            if step % 10 == 0:
                values = {"validation/bits_per_byte": loss + 6 / step, "validation/loss": loss}
                file.write(json.dumps({"step": step, "time": 1.0 * step, **values}) + "\n")
    for path, text in files.items():
        (directory / path.replace("__", ".")).write_text(text)
    return directory


def write_probe(run, name="extrapolation", step=40, **record):
    (run / "eval" / str(step)).mkdir(parents=True, exist_ok=True)
    (run / "eval" / str(step) / f"{name}.json").write_text(json.dumps(record))


def curve(*y, **more):
    return {
        "x": [16, 32, 64, 128, 256][: len(y)],
        "y": list(y),
        "xlabel": "context",
        "ylabel": "nats",
        **more,
    }


def page_of(path):
    page = Page(path.read_text())
    assert len(set(page.ids)) == len(page.ids)
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert not [link for link in page.links if "/" in link]
    assert set(re.findall(r"url\((.)", path.read_text())) <= {"#"}
    return page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("data") / "corpus")
    experiment, workdir = tiny(corpus, steps=4), tmp_path_factory.mktemp("trained") / "run"
    experiment.train.eval_every = 2
    train.run(experiment, workdir, jax.devices()[:1])
    return workdir, experiment


def test_training_ends_with_a_report(trained):
    workdir, experiment = trained
    page = page_of(workdir / "report.html")
    data = json.loads((workdir / "report.json").read_text())["data"]
    result = json.loads((workdir / "result.json").read_text())
    (run,) = data["runs"]
    shapes = Functional.create(lambda rngs: LM(experiment.model, rngs=rngs)).shapes
    assert run["parameters"] == parameter_count(shapes)
    assert run["step"] == run["steps"] == 4 and run["tokens_seen"] == 4 * 8 * 32
    held_out = data["architectures"][0]["held_out"]["validation/bits_per_byte"]
    assert held_out["values"] == [result["validation/bits_per_byte"]] and held_out["sd"] is None
    assert f"{result['validation/bits_per_byte']:.3f}" in page.text
    memory = words.memory(result["memory/host_peak_bytes"]).replace(words.GLUE, " ")
    assert f"{memory} host" in page.text
    assert f"jax {jax.__version__}" in page.text
    assert len(page.charts) == 1 and "validation: " in page.charts[0]


def test_every_start_is_recorded_and_a_broken_record_keeps_no_run_from_starting(tmp_path):
    for step in (0, 30):
        run_record.save_environment(tmp_path, step)
    first, second = run_record.load_environment(tmp_path)
    assert (first["step"], second["step"]) == (0, 30) and first["cores"] >= 1
    assert first["versions"]["jax"] == jax.__version__
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(ValueError, match=r"environment.json is not JSON"):
        run_record.load_environment(tmp_path)
    run_record.save_environment(tmp_path, 50)
    assert [start["step"] for start in run_record.load_environment(tmp_path)] == [50]


def test_seeds_make_one_architecture(tmp_path):
    losses = [2.0, 2.2, 2.7]
    for seed, loss in enumerate(losses):
        write_run(tmp_path / f"a{seed}", name=f"small-seed{seed}", seed=seed, loss=loss)
    write_run(tmp_path / "b", name="other", lr=0.01, loss=2.5)
    groups = group_runs([read_run(tmp_path / d) for d in ("a0", "b", "a1", "a2")])
    assert [g.label for g in groups] == ["small-seed", "other"]
    assert [run.seed for run in groups[0].runs] == [0, 1, 2]
    found = groups[0].last("validation/bits_per_byte")
    assert found.mean == pytest.approx(np.mean(losses) + 6 / 40)
    assert found.sd == pytest.approx(np.std(losses, ddof=1))
    *thin, mean = [
        s for s in learning_curves(groups, ["validation/bits_per_byte"])[0].series if s.colour == 0
    ]
    assert len(thin) == 3 and all(s.thin and not s.name for s in thin)
    assert list(mean.x) == [10, 20, 30, 40]
    np.testing.assert_allclose(np.array(mean.high) - np.array(mean.low), 2 * np.std(losses, ddof=1))


def test_a_run_from_before_a_field_existed_is_of_the_same_architecture(tmp_path):
    for seed, directory in enumerate("ab"):
        write_run(tmp_path / directory, seed=seed)
    path = tmp_path / "b" / "config.json"
    path.write_text(from_json(path.read_text()).to_json())  # with every field
    assert len(group_runs([read_run(tmp_path / d) for d in "ab"])) == 1
    path.write_text(json.dumps(json.loads(path.read_text()) | {"no_longer": 1}))
    assert len(group_runs([read_run(tmp_path / d) for d in "ab"])) == 2


def test_a_comparison(tmp_path, capsys):
    references = json.dumps(
        {"reference/xz": 1.9, "reference/ngram_order_2": 9.5, "memory/host_peak_bytes": 2**31}
    )
    for seed in range(2):
        write_run(tmp_path / f"a{seed}", seed=seed, loss=2 + seed / 10, sample__txt="x < <b>y</b> & z")
    write_run(tmp_path / "b", lr=0.01, loss=1.8, result__json=references)
    write_run(tmp_path / "c", name="late", lr=0.1, until=13)
    (tmp_path / "nothing").mkdir()
    main([*(str(tmp_path / d) for d in ("a0", "a1", "b", "c", "nothing")), f"--out={tmp_path}/deep/it.html"])
    page = page_of(tmp_path / "deep" / "it.html")
    data = json.loads((tmp_path / "deep" / "it.json").read_text())
    said = capsys.readouterr()
    assert "it.html" in said.out and f"{tmp_path}/nothing is no run" in said.err
    assert data["data"]["unreadable"].keys() == {str(tmp_path / "nothing")} and "no config.json" in page.text
    assert "Lowest validation bits per byte: 1.950 (small (b))." in page.text
    assert "2.200 ± 0.071" in page.text and "2.600\nat step 10" in page.text and "2.00 GiB host" in page.text
    assert f"{tmp_path}/c was at step 13 of 40" in page.text and "different steps" in page.text
    assert "x < <b>y</b> & z" in page.text, "samples are text, never markup"
    differ = next(
        b for s in data["sections"] for b in s["blocks"] if b.get("caption") == "Only what differs."
    )
    assert differ["rows"] == [["optim.lr", "0.001", "0.01", "0.1"]]
    first, second = (b for s in data["sections"] for b in s["blocks"] if b["kind"] == "chart")
    assert first["references"] == {"xz -9, validation alone": 1.9}, "9.5 would squeeze the chart"
    assert [s["name"] for s in second["series"] if s["name"]] == ["small (a0)", "small (b)", "late"]
    assert len(page.charts) == 2


def test_other_batch_sizes_are_compared_by_tokens(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", rows=16)
    chart = learning_curves(group_runs([read_run(tmp_path / d) for d in "ab"]), ["validation/bits_per_byte"])[
        0
    ]
    assert chart.xlabel == "tokens seen"
    assert [s.x[-1] for s in chart.series] == [40 * 8 * 32, 40 * 16 * 32]


def test_probes_appear_whatever_they_are(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed=seed) for seed in range(2)]
    runs.append(write_run(tmp_path / "b", lr=0.01))
    runs.append(write_run(tmp_path / "a2", seed=2))  # of which only an early checkpoint was probed
    write_probe(runs[3], step=20, numbers={"1x": 99.0}, curves={"full": curve(99.0)})
    for i, run in enumerate(runs[:2]):
        write_probe(run, step=20, numbers={"old": 1.0}, curves={})
        curves = {"full": curve(3.0 + i, 2.0, 1.0, 0.5, 0.4), "cut": curve(3.0, 2.5, 2.4)}
        write_probe(
            run, numbers={"1x": 2.0 + i, "rows": {"4x": 12}, "loss": {"1x": i, "2x": 3}}, curves=curves
        )
    write_probe(runs[2], error="ValueError: no room", traceback=["..."])
    write_probe(runs[2], "lone", numbers={}, curves={"one": curve(1.0, 2.0, error=[0.5, 0.25])})
    made = report.of_runs(runs)
    sections = {s.title: s for s in made.sections}
    chart, table, by_length = sections["Probe: extrapolation"].blocks
    assert chart.log_x and [s.name for s in chart.series if s.name] == ["full", "cut"]
    assert [list(s.y) for s in chart.series if s.name == "full"] == [[3.5, 2.0, 1.0, 0.5, 0.4]]
    assert table.rows == [["1x", "2.5 ± 0.71".replace(" ", words.GLUE)], ["rows.4x", "12"]]
    assert by_length.header == ["number", "1x", "2x"]
    assert by_length.rows == [["loss", "0.5 ± 0.71".replace(" ", words.GLUE), "3"]]
    assert "small (b): no result, ValueError: no room." in sections["Probe: extrapolation"].lead
    (lone,) = sections["Probe: lone"].blocks
    assert (
        lone.series[0].high == [1.5, 2.25] and "Not recorded for small (a0)" in sections["Probe: lone"].lead
    )


def test_heat_maps_of_probes_are_drawn_each_architecture_on_its_own(tmp_path):
    runs = [write_run(tmp_path / f"a{seed}", seed=seed) for seed in range(2)]
    runs.append(write_run(tmp_path / "b", lr=0.01))
    for i, run in enumerate(runs):
        grid = {"x": ["256", "512"], "y": ["10 %", "90 %"], "values": [[i, 0.5], [0.25, 1.0]], "high": 2.0}
        short = {**grid, "values": [[1.0, 2.0]]}  # a row too few
        write_probe(run, "passkey", numbers={}, grids={"found": grid | {"ylabel": "depth"}, "short": short})
    sections = {s.title: s for s in report.of_runs(runs).sections}
    mean, alone = sections["Probe: passkey"].blocks
    assert mean.values == [[0.5, 0.5], [0.25, 1.0]] and mean.caption == "Mean over 2 seeds."
    assert mean.ylabel == "depth" and (mean.low, mean.high) == (0.0, 2.0)
    assert alone.title == "small (b), found" and alone.values[0] == [2.0, 0.5]
    write_probe(runs[2], "passkey", numbers={}, grids={"found": [1, 2]})
    assert any("should be objects" in note for note in read_run(runs[2]).notes)


def test_what_is_missing_is_said(tmp_path):
    run = write_run(tmp_path / "run", until=3)
    made = report.of_runs([run, tmp_path / "." / "run"])
    assert len(made.data["runs"]) == 1, "a directory named twice counts once"
    assert "No evaluation on held-out data" in made.summary
    result = made.sections[0].blocks[0]
    cells = dict(zip(result.header, result.rows[0]))
    assert cells["validation"] == cells["peak memory"] == cells["parameters"] == words.MISSING
    page_of(report.save(made, tmp_path / "it.html"))


def test_bad_lines_are_counted_and_bad_files_named(tmp_path):
    run = write_run(tmp_path / "run", result__json="{", environment__json="[1]")
    write_probe(run, numbers=[1])
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 1\n[3]\n' + text + '{"step": 41, "trai')
    found = read_run(run)
    assert found.step == 40 and len(found.records) == 40
    assert [re.sub(r"^\S*/run/", "", note)[:34] for note in found.notes] == [
        "metrics.jsonl: 2 of 47 lines are n",
        "environment.json should be a list ",
        "result.json is no JSON object and ",
        'eval/40/extrapolation.json: "numbe',
    ]
    assert "(line 1, 2)" in found.notes[0]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.jsonl", "", "run/metrics.jsonl is empty"),
        ("metrics.jsonl", "{\n[]\n", "run/metrics.jsonl: none of its 2 lines"),
        ("config.json", "{", "run/config.json is not JSON"),
        ("config.json", "[]", "run/config.json holds '\\[\\]', expected an object"),
        ("metrics.jsonl", None, "run has no metrics.jsonl"),
        ("config.json", None, "run is no run: it has no config.json \\(found: metrics.jsonl\\)"),
    ],
)
def test_a_directory_that_is_no_run(tmp_path, file, text, message):
    run = write_run(tmp_path / "run")
    (run / file).unlink() if text is None else (run / file).write_text(text)
    with pytest.raises(SystemExit, match=f"RunError: .*{message}"):
        main([str(run)])
    assert not (run / "report.html").exists()


def test_no_such_directory_and_other_names(tmp_path):
    with pytest.raises(RunError, match=r"gone does not exist"):
        report.write([tmp_path / "gone"])
    run = write_run(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"--out=.*report.pdf should end in .html"):
        main([str(run), f"--out={tmp_path}/report.pdf"])


def test_time_is_summed_over_starts(tmp_path):
    run = write_run(tmp_path / "run", until=30)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = [{"step": s, "seconds/step": 0.5, "seconds/total": 4.0} for s in (31, 32)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, *map(json.dumps, again)]) + "\n")
    assert read_run(run).seconds() == pytest.approx({"step": 3.5, "total": 12.0})


def test_values_that_are_not_finite_break_lines_and_nothing_else(tmp_path):
    run = write_run(tmp_path / "run", until=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 11, "train/bits_per_byte": "nan", "validation/bits_per_byte": "inf"}) + "\n"
        )
    path = report.write([run])
    assert "not finite" in page_of(path).text
    json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)


def test_lines_are_cut_at_gaps_and_scaled_to_the_axes():
    drawn = charts.draw(
        Chart("t", "x", "y", [Series("a", [1, 2, 3, 4], [1, math.nan, 2, 3])], log_x=True), "k"
    )
    (line,) = re.findall(r'class="line" d="([^"]+)"', drawn)
    assert line.count("M") == 2 and line.count("L") == 1
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", line) if p]
    assert points[-1][0] == pytest.approx(charts.WIDTH - charts.RIGHT, abs=12)
    assert points[-1][1] < points[1][1] < points[0][1], "larger values lie higher"
    assert "nothing recorded" in charts.draw(Chart("t", "x", "y", []), "k")


def test_a_study_can_make_its_own_report(tmp_path):
    table = Table(["what", "value"], [["a", "1"]], best=[(0, 1)])
    chart = Chart("By size", "size", "score", [Series("a", [1, 2], [3, 4], [2, 3], [4, 5])])
    made = Report("A study", "What it found.", [Section("One", [table, chart, table])], data={"seed": 0})
    path = report.save(made, tmp_path / "study.html")
    assert page_of(path).charts[0].startswith("By size. score against size. a: 3 at 1, 4 at 2.")
    assert json.loads((tmp_path / "study.json").read_text())["data"] == {"seed": 0}


def test_small_things():
    assert running_mean([1.0, 3.0, math.nan, 5.0], 0.5)[:2] == [1.0, 2.0]
    assert running_mean([1.0, 3.0, math.nan, 5.0], 0.5)[3] == 5.0
    assert thin_out(range(1000), most=3) == [[0, 500, 999]] and thin_out([], []) == [[], []]
    counts = [words.count(n) for n in (950, 12_345, 646_976, 8_656_000_000)]
    times = [words.duration(s) for s in (0.21, 45.2, 260, 11_100)]
    assert ", ".join(counts).replace(words.GLUE, " ") == "950, 12.3 k, 0.647 M, 8.66 G"
    assert ", ".join(times).replace(words.GLUE, " ") == "0.2 s, 45 s, 4 min 20 s, 3 h 05 min"
    assert words.listed(["a", "b", "c"]) == "a, b and c" and words.plural(1, "run") == "1 run"
    assert (
        words.plus_minus(Statistic.of([1.0, 2.0])).split(words.GLUE) == ["1.500", "±", "0.707"]
        and Statistic.of([]) is None
    )

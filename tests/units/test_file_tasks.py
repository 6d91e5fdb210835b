"""Questions from files: what is read, asked and scored; LongBench's and RULER's lines are made here."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from eval import file_tasks
from eval.answer_scores import (
    LONGBENCH,
    RULER,
    classification,
    code_similarity,
    count,
    f1,
    retrieval,
    rouge_l,
)
from eval.file_questions import FileTaskError, read_files
from eval.generate import Generator
from eval.opened import OpenRun, RunError
from eval.sampling import Sampling
from objectives import model_of
from runtime.mesh import MeshConfig, make_mesh
from tasks.tokenizer import ByteTokenizer
from tests.experiments import tiny

LINE = {"context": "Ann is in Rome.", "input": "Where is Ann?", "answers": ["Rome"], "dataset": "hotpotqa"}
NEEDLE = {"index": 0, "input": "The number is 7.", "outputs": ["7", "8"], "answer_prefix": " It is"}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("score", "said", "answer", "classes", "expected"),
    [
        (f1, "The Rome, in Italy!", "in Rome", (), 2 * 2 / 5),
        (f1, "an a the", "Rome", (), 0),
        (f1, "rome rome", "Rome", (), 2 / 3),
        (classification, "Number", "Number", ("Number", "Place"), 1),
        (classification, "Number or Place", "Number", ("Number", "Place"), 1 / 2),
        (classification, "Street number", "Street number", ("number", "Street number"), 1),
        (classification, "nothing", "Number", ("Number",), 0),
        (retrieval, "Paragraph 3, not 30", "Paragraph 3", (), 1 / 2),
        (count, "there are 4 of 4", "4", (), 1),
        (count, "none", "4", (), 0),
    ],
)
def test_scores(score, said, answer, classes, expected):
    assert score(said, answer, classes) == pytest.approx(expected)


def test_scores_of_the_packages():
    pytest.importorskip("rouge")
    pytest.importorskip("rapidfuzz")
    # The longest common subsequence of "a b c d" and "a c d e" has three words.
    assert rouge_l("a b c d", "a c d e") == pytest.approx(3 / 4, abs=1e-6)
    assert rouge_l("", "a") == 0
    assert code_similarity("\n# why\nabcd = 1\n", "abcd = 2") == 0.88  # 7 of 8 characters, rounded
    assert code_similarity("# why", "abcd") == 0


def test_files_are_read(tmp_path):
    longer = LINE | {"dataset": "hotpotqa_e", "length": 5000}
    write(tmp_path / "bench" / "hotpotqa.jsonl", LINE, LINE)
    write(tmp_path / "bench" / "hotpotqa_e.jsonl", longer)
    write(tmp_path / "ruler" / "vt" / "validation.jsonl", NEEDLE)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"hotpotqa": "Q: {input} T: {context} A:"}))
    bench, extended, ruler = read_files(
        [str(tmp_path / "bench"), str(tmp_path / "ruler/*/*.jsonl")], prompts, 1
    )
    (question,) = bench.questions
    assert bench.measure is extended.measure is LONGBENCH["hotpotqa"]
    assert question.text == "Q: Where is Ann? T: Ann is in Rome. A:" and extended.questions[0].length == 5000
    assert ruler.measure is RULER["vt"] and ruler.questions[0].text == "The number is 7. It is"
    (plain,) = read_files([str(tmp_path / "bench" / "hotpotqa.jsonl")])
    assert len(plain.questions) == 2
    assert plain.questions[0].text == "Ann is in Rome.\n\nWhere is Ann?"


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("a", [LINE | {"dataset": "vcsum"}], r"a\.jsonl:1: dataset 'vcsum' is not in .*Chinese words"),
        ("a", [LINE, {"text": 1}], r"a\.jsonl:2 should have dataset, context.*found \['text'\]"),
        ("a", [NEEDLE], "RULER's task is the name of the file or of its directory, one of"),
        ("qa_1", [NEEDLE | {"outputs": []}], "the answers should be a list of at least one"),
        ("a", [], "should hold the questions of one data set, found"),
        ("a", [LINE, LINE | {"dataset": "lcc"}], r"found \['hotpotqa', 'lcc'\]"),
    ],
)
def test_bad_files(tmp_path, name, rows, message):
    with pytest.raises(FileTaskError, match=message):
        read_files([write(tmp_path / f"{name}.jsonl", *rows)])


def test_bad_arguments(tmp_path):
    file = write(tmp_path / "hotpotqa.jsonl", LINE)
    with pytest.raises(FileTaskError, match="matches no file"):
        read_files([str(tmp_path / "*.json")])
    with pytest.raises(FileTaskError, match="--limit=0 should be at least 1"):
        read_files([file], limit=0)
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "a JSON object"),
        ('{"lcc": ""}', "has none for 'hotpotqa'"),
    ):
        (tmp_path / "prompts").write_text(text)
        with pytest.raises(FileTaskError, match=message):
            read_files([file], tmp_path / "prompts")
    (tmp_path / "prompts").write_text('{"hotpotqa": "{question}"}')
    with pytest.raises(FileTaskError, match="asks for 'question', not in the line"):
        read_files([file], tmp_path / "prompts")
    write(tmp_path / "again" / "hotpotqa.jsonl", LINE)
    with pytest.raises(FileTaskError, match="hotpotqa is in two files"):
        read_files([str(tmp_path)])
    with pytest.raises(SystemExit, match="RunError"):
        file_tasks.main([f"--workdir={tmp_path / 'none'}", "--files", file])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained recurrent run on bytes, of which no file exists."""
    root = tmp_path_factory.mktemp("run")
    experiment = tiny(root)
    experiment.model.pattern = "M"
    model = model_of(experiment)
    params = model.init(jax.random.key(0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return OpenRun(root / "run", experiment, 5, model, params, None, ByteTokenizer(), mesh)


def test_long_prompts_lose_their_middle(run):
    examinee = file_tasks.Examinee(run, max_length=9, document_start=False)
    np.testing.assert_array_equal(examinee.prompt("0123456789abc", 4), np.frombuffer(b"012349abc"[:9], "u1"))
    assert examinee.prompt("short", 4).size == 5
    assert file_tasks.Examinee(run).max_length == run.config.task.seq_len
    with pytest.raises(FileTaskError, match="--max_length=0 and --rows=4 should be at least 1"):
        file_tasks.Examinee(run, max_length=0)
    with pytest.raises(RunError):
        file_tasks.Examinee(dataclasses.replace(run, tokenizer=None))


def test_the_command(run, tmp_path, monkeypatch, capsys):
    """Scores are those of what the run says to each prompt alone."""
    said = Generator(run).generate(["The number is 7. It is"], Sampling(temperature=0.0), max_new_tokens=30)
    letter = said[0].text.strip()[0].lower()
    first = NEEDLE | {"outputs": [letter, "not this"]}
    file = write(tmp_path / "vt.jsonl", first, NEEDLE | {"length": 3}, first | {"input": "x"})
    monkeypatch.setattr(file_tasks, "open_run", lambda workdir, step: run)
    file_tasks.main(["--workdir=RUN", "--files", file, "--rows=2", f"--out={tmp_path / 'out'}"])
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out" / "vt.jsonl").read_text().splitlines()]
    assert lines[0]["pred"] == said[0].text and lines[0]["answers"] == [letter, "not this"]
    points = [100 * np.mean([a.lower() in x["pred"].lower() for a in x["answers"]]) for x in lines]
    assert points[0] == 50 and record["results"]["vt"]["score"] == pytest.approx(np.mean(points))
    assert record["results"]["vt"]["count"] == 3 and record["settings"]["max_length"] == 32
    assert "string_match_all" in capsys.readouterr().out


def test_scores_by_length_of_the_first_line(tmp_path):
    rows = [
        {**LINE, "dataset": "trec", "answers": ["Place"], "all_classes": ["Place", "Number"], "length": n}
        for n in (10, 20, 9000)
    ]
    (asked,) = read_files([write(tmp_path / "trec.jsonl", *rows)])
    found = file_tasks.scored(asked, ["\nPlace\nNumber", "Number", "Place"])
    assert found["score"] == pytest.approx(200 / 3) and found["measure"] == "classification"
    assert {name: one["score"] for name, one in found["by_length"].items()} == {
        "below 4k": 50,
        "8k and more": 100,
    }

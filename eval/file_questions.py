"""Questions of LongBench and RULER read from files that one has: nothing is fetched.

A line of LongBench's jsonl has dataset, context, input, answers, all_classes and length; one of RULER's has
input and outputs, and its task is the name of the file or of its directory.
"""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.answer_scores import LONGBENCH, RULER, Measure, missing_package

CHINESE = ("dureader", "multifieldqa_zh", "vcsum")
PLAIN = "{context}\n\n{input}"  # where no prompts are given


class FileTaskError(ValueError):
    """A file of questions cannot be used; the message names it and what was expected."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a file.

    Attributes:
        text: all that the model reads.
        answers: right ones.
        classes: of the data set, where answers are classes.
        length: as the file has it, None where it does not say.
    """

    text: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int | None


@dataclasses.dataclass(frozen=True)
class Asked:
    """The questions of one data set and how its answers are scored."""

    name: str
    file: Path
    measure: Measure
    questions: tuple[Question, ...]


def read_files(
    patterns: Sequence[str], prompts: str | Path | None = None, limit: int | None = None
) -> list[Asked]:
    """The data sets in files.

    Args:
        patterns: files, glob patterns, or directories (all .jsonl in them).
        prompts: LongBench's dataset2prompt.json: prompts with {context} and {input}, by data set; None asks
            ``PLAIN``.
        limit: questions of each, at most: the first.

    Raises:
        FileTaskError: there are no files, two of one data set, a line that is neither, an unknown data set.
    """
    if limit is not None and limit < 1:
        raise FileTaskError(f"--limit={limit} should be at least 1")
    found: dict[str, Asked] = {}
    by_name = None if prompts is None else _prompts(Path(prompts))
    for file in _matching(patterns):
        asked = _read(file, by_name, limit)
        if asked.name in found:
            raise FileTaskError(
                f"{asked.name} is in two files, {found[asked.name].file} and {file}; give one"
            )
        found[asked.name] = asked
    return list(found.values())


def _prompts(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileTaskError(f"--prompts: {path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(prompt, str) for prompt in found.values()):
        raise FileTaskError(f"--prompts: {path} should be a JSON object of prompts by data set")
    return found


def _matching(patterns: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        some = sorted(path.rglob("*.jsonl")) if path.is_dir() else sorted(map(Path, glob.glob(pattern)))
        if not some:
            raise FileTaskError(
                f"--files: {pattern} matches no file; give .jsonl files of LongBench or RULER"
            )
        files += some
    return list(dict.fromkeys(files))


def _read(file: Path, prompts: Mapping[str, str] | None, limit: int | None) -> Asked:
    questions: list[Question] = []
    names: set[str] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or (limit is not None and len(questions) >= limit):
            continue
        place = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FileTaskError(f"{place} is not JSON: {error}") from error
        name, question = _question(row, file, place, prompts)
        names.add(name)
        questions.append(question)
    if len(names) != 1:
        raise FileTaskError(f"{file} should hold the questions of one data set, found {sorted(names)}")
    (name,) = names
    measure = LONGBENCH[name.removesuffix("_e")] if name.removesuffix("_e") in LONGBENCH else RULER[name]
    package = missing_package(measure)
    if package:
        raise FileTaskError(f"{file}: the score {measure.name} needs {package}: pip install -e '.[files]'")
    return Asked(name, file, measure, tuple(questions))


def _question(row: Any, file: Path, place: str, prompts: Mapping[str, str] | None) -> tuple[str, Question]:
    """The data set and the question of a line."""
    fields = set(row) if isinstance(row, dict) else set()
    if {"context", "input", "answers", "dataset"} <= fields:
        name, text, answers = _longbench(row, place, prompts)
    elif {"input", "outputs"} <= fields:
        name = file.parent.name if file.parent.name in RULER else file.stem
        text, answers = f"{row['input']}{row.get('answer_prefix', '')}", row["outputs"]
        if name not in RULER:
            raise FileTaskError(
                f"{file}: RULER's task is the name of the file or of its directory, one of {sorted(RULER)}"
            )
    else:
        raise FileTaskError(
            f"{place} should have dataset, context, input and answers (LongBench) or input and outputs "
            f"(RULER), found {sorted(fields)[:8]}"
        )
    if not isinstance(answers, list) or not answers:
        raise FileTaskError(f"{place}: the answers should be a list of at least one, found {answers!r}")
    classes = tuple(row.get("all_classes") or ())
    return name, Question(text, tuple(map(str, answers)), classes, row.get("length"))


def _longbench(row: dict[str, Any], place: str, prompts: Mapping[str, str] | None) -> tuple[str, str, Any]:
    """Data set, text and answers of a line of LongBench."""
    name = str(row["dataset"])
    known = name.removesuffix("_e")
    if known not in LONGBENCH:
        more = "; its score needs Chinese words, which nothing here finds" if known in CHINESE else ""
        raise FileTaskError(f"{place}: dataset {name!r} is not in {sorted(LONGBENCH)}{more}")
    if prompts is not None and known not in prompts:
        raise FileTaskError(f"{place}: --prompts has none for {known!r}, only for {sorted(prompts)}")
    try:
        text = (PLAIN if prompts is None else prompts[known]).format(**row)
    except (KeyError, IndexError, ValueError) as error:
        raise FileTaskError(f"{place}: the prompt of {known!r} asks for {error}, not in the line") from error
    return name, text, row["answers"]

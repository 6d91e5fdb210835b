"""LongBench's and RULER's questions on a run, from files that one has: nothing is fetched.

``python -m eval.file_tasks --workdir=RUN --files hotpotqa.jsonl data/niah_single_1/validation.jsonl``. Scores
and new tokens are those of the data set (`eval.answer_scores`); text is continued greedily.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int
from rich.console import Console
from rich.table import Table

from configs.base import ConfigError
from eval.file_questions import Asked, FileTaskError, read_files
from eval.generate import Generator
from eval.opened import OpenRun, RunError, open_run
from eval.sampling import Sampling
from models.config import LMConfig
from runtime.checkpoint import ArchitectureError, CheckpointError
from runtime.host import restart_with_tuned_malloc

BUCKETS = ((4000, "below 4k"), (8000, "4k to 8k"), (np.inf, "8k and more"))  # of words, as LongBench-E has


class Examinee:
    """A run that answers questions.

    Args:
        max_length: tokens of a prompt; the middle of a longer one is left out, as LongBench does. None for
            the run's positions, or its training length (``task.seq_len``) where it has none.
        rows: questions answered at once.
        document_start: whether a prompt begins with the token that opens documents; None for the
            tokenizer's own rule.

    Raises:
        RunError: the run is no language model, or has no tokenizer.
        FileTaskError: ``max_length`` or ``rows`` is not positive.
    """

    def __init__(
        self,
        run: OpenRun,
        *,
        max_length: int | None = None,
        rows: int = 4,
        document_start: bool | None = None,
    ):
        if not isinstance(run.config.model, LMConfig):
            raise RunError(f"{run.workdir} is of kind {run.config.kind!r}; questions need a language model")
        self._ids = run.need_tokenizer()
        self.max_length = max_length or run.config.model.longest or run.config.task.seq_len
        if min(self.max_length, rows) < 1 or max_length == 0:
            raise FileTaskError(f"--max_length={max_length} and --rows={rows} should be at least 1")
        self.run, self.rows = run, rows
        opens = getattr(self._ids, "opens", True)
        self.document_start = opens if document_start is None else document_start
        self._generator = Generator(run)

    def prompt(self, text: str, new_tokens: int) -> Int[np.ndarray, " L"]:
        """Ids of a prompt, its middle left out where there is no room."""
        ids = self._ids.encode(text, separator=self.document_start)
        limit = self.run.config.model.longest
        room = self.max_length if limit is None else min(self.max_length, max(limit - new_tokens, 1))
        half = room // 2
        return ids if len(ids) <= room else np.concatenate([ids[: room - half], ids[len(ids) - half :]])

    def answer(self, asked: Asked) -> list[str]:
        """What the run says to every question, greedily."""
        new, said = asked.measure.new_tokens, dict[int, str]()
        prompts = [self.prompt(question.text, new) for question in asked.questions]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        room = _rounded(max(map(len, prompts)) + new)  # few programs are compiled
        for first in range(0, len(order), self.rows):
            some = order[first : first + self.rows]
            group = [prompts[i].tolist() for i in some]
            group += [group[-1]] * (self.rows - len(group))  # one shape for all
            done = self._generator.generate(
                group, Sampling(temperature=0.0), max_new_tokens=new, max_len=room
            )
            said |= {i: one.text or "" for i, one in zip(some, done)}
        return [said[i] for i in range(len(prompts))]


def _rounded(length: int) -> int:
    return 1 << (length - 1).bit_length()


def scored(asked: Asked, said: Sequence[str]) -> dict[str, Any]:
    """Score of a data set in percent, with its standard error, in all and by length where lines have one."""
    measure, points = asked.measure, []
    for question, text in zip(asked.questions, said, strict=True):
        counted = text.lstrip("\n").split("\n")[0] if measure.first_line else text
        points.append(100 * measure.score(counted, question.answers, question.classes))
    found = {"measure": measure.name, **_mean(points)}
    lengths = [question.length for question in asked.questions if question.length is not None]
    if len(lengths) == len(points):
        buckets = [next(name for end, name in BUCKETS if length < end) for length in lengths]
        found["by_length"] = {
            name: _mean([p for p, bucket in zip(points, buckets) if bucket == name])
            for _, name in BUCKETS
            if name in buckets
        }
    return found


def _mean(points: Sequence[float]) -> dict[str, float]:
    spread = float(np.std(points, ddof=1) / np.sqrt(len(points))) if len(points) > 1 else 0.0
    return {"score": float(np.mean(points)), "standard_error": spread, "count": len(points)}


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m eval.file_tasks", allow_abbrev=False)
    add = options.add_argument
    add("--workdir", required=True, help="directory of the run")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--files", required=True, nargs="+", help="jsonl files, glob patterns or directories of them")
    add("--prompts", help="LongBench's dataset2prompt.json (default: the context, then the input)")
    add("--max_length", type=int, help="tokens of a prompt; a longer one loses its middle")
    add("--limit", type=int, help="questions of each data set, at most")
    add("--rows", type=int, default=4, help="questions answered at once")
    add("--document_start", action=argparse.BooleanOptionalAction, help="open every prompt with that token")
    add("--out", help="directory for results.json and what was said (default: RUN/eval/STEP/file_tasks)")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    given = parser().parse_args(argv)
    try:
        every = read_files(given.files, given.prompts, given.limit)
        run = open_run(given.workdir, given.step)
        examinee = Examinee(
            run, max_length=given.max_length, rows=given.rows, document_start=given.document_start
        )
        out = epath.Path(given.out or run.workdir / "eval" / str(run.step) / "file_tasks")
        _examine(examinee, every, out, {"max_length": examinee.max_length, "prompts": given.prompts})
    except (RunError, ConfigError, ArchitectureError, CheckpointError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _examine(examinee: Examinee, every: Sequence[Asked], out: epath.Path, settings: dict[str, Any]) -> None:
    """Ask all, write what is said and the scores after each data set, and print a table."""
    out.mkdir(parents=True, exist_ok=True)
    console, results = Console(), dict[str, Any]()
    table = Table("data set", "measure", "questions", "score", "+-")
    for asked in every:
        with console.status(f"{asked.name}: {len(asked.questions)} questions"):
            said = examinee.answer(asked)
        results[asked.name] = one = scored(asked, said) | {"file": str(asked.file)}
        lines = [
            {"pred": text, "answers": q.answers, "all_classes": q.classes, "length": q.length}
            for q, text in zip(asked.questions, said)
        ]
        (out / f"{asked.name}.jsonl").write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
        record = {"step": examinee.run.step, "settings": settings, "results": results}
        (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        table.add_row(
            asked.name,
            one["measure"],
            str(one["count"]),
            f"{one['score']:.2f}",
            f"{one['standard_error']:.2f}",
        )
    console.print(table)
    console.print(f"written to {out}")


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()

"""How well what was said answers a question, by the measures of LongBench (arXiv:2308.14508) and RULER.

Each score is ``score(said, answer, classes)`` in 0..1; of several right answers the best one counts.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
import string
from collections.abc import Callable, Sequence

from eval.probes.needles import TOKENS, string_match_all

Score = Callable[[str, str, Sequence[str]], float]


@dataclasses.dataclass(frozen=True)
class Measure:
    """How the answers to one data set are made and scored.

    Attributes:
        name: of the score.
        score: of one answer against all right ones and the classes of the data set.
        new_tokens: that may be said.
        first_line: whether only the first line of what is said counts.
    """

    name: str
    score: Callable[[str, Sequence[str], Sequence[str]], float]
    new_tokens: int
    first_line: bool = False


def f1(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Of the words, their number counted; case, punctuation and articles apart (SQuAD's)."""
    ours, theirs = _words(said), _words(answer)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _words(text: str) -> list[str]:
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def rouge_l(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L's F as the package ``rouge`` has it, which the published numbers were made with."""
    from rouge import Rouge  # extra "files", as rapidfuzz

    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(said, answer)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # nothing was said, or too long a sentence: 0 there as well
        return 0.0


def code_similarity(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line said that is no comment and no mark-up."""
    from rapidfuzz import fuzz

    lines = said.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, answer)) / 100


def classification(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes named, if the right one is; a name inside the right one counts as it."""
    named = [name for name in classes if name in said and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def retrieval(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers said that are the number of the right paragraph."""
    (right,) = re.findall(r"\d+", answer)[:1] or [None]
    return _share(said, right)


def count(said: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers said that are the right one."""
    return _share(said, answer.strip())


def _share(said: str, right: str | None) -> float:
    numbers = re.findall(r"\d+", said)
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def _best(score: Score) -> Callable[[str, Sequence[str], Sequence[str]], float]:
    return lambda said, answers, classes: max(score(said, answer, classes) for answer in answers)


def _all(said: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    return string_match_all(said, tuple(answers))


def _part(said: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    return max(string_match_all(said, (answer,)) for answer in answers)


def _measures(score: Score, tokens: dict[str, int], first_line: bool = False) -> dict[str, Measure]:
    name, best = score.__name__, _best(score)
    return {dataset: Measure(name, best, new, first_line) for dataset, new in tokens.items()}


ANSWERS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
}
LONGBENCH: dict[str, Measure] = {
    **_measures(f1, ANSWERS),
    **_measures(f1, {"triviaqa": 32}, first_line=True),
    **_measures(rouge_l, {"gov_report": 512, "qmsum": 512, "multi_news": 512}),
    **_measures(rouge_l, {"samsum": 128}, first_line=True),
    **_measures(classification, {"trec": 64, "lsht": 64}, first_line=True),
    **_measures(retrieval, {"passage_retrieval_en": 32, "passage_retrieval_zh": 32}),
    **_measures(count, {"passage_count": 32}),
    **_measures(code_similarity, {"lcc": 64, "repobench-p": 64}),
}
"""By data set. Those whose score needs Chinese words are not here."""

RULER: dict[str, Measure] = {
    **{task: Measure("string_match_all", _all, new) for task, new in TOKENS.items()},
    "qa_1": Measure("string_match_part", _part, 32),
    "qa_2": Measure("string_match_part", _part, 32),
}


def missing_package(measure: Measure) -> str | None:
    """The package that a score needs and that is not installed."""
    package = {"rouge_l": "rouge", "code_similarity": "rapidfuzz"}.get(measure.name)
    return package if package and importlib.util.find_spec(package) is None else None

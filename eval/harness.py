"""Standard tasks on a run, by EleutherAI's lm-evaluation-harness (extra ``harness``).

``python -m eval.harness --workdir=RUN --tasks=lambada_openai,hellaswag``; tasks of one's own from YAML files
with ``--include_path=DIR``, which need no download if their data is local.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from configs.base import ConfigError
from eval.generate import Generator
from eval.likelihood import Likelihood, likelihoods
from eval.opened import OpenRun, RunError, open_run
from eval.sampling import Sampling
from runtime.checkpoint import ArchitectureError, CheckpointError
from runtime.host import restart_with_tuned_malloc

try:
    from lm_eval import evaluator
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as error:
    raise ImportError("eval.harness needs the lm-evaluation-harness: pip install -e '.[harness]'") from error

NEW_TOKENS = 256  # where a task does not say
PROMPT_PIECE = 64  # of a prompt that is continued: short, so that most prompts have one shape


class RunLM(TemplateLM):
    """A run as the harness asks for it.

    A text begins as the tokenizer's own rule has it: with a token that opens documents or without, as when
    the harness evaluates the same checkpoint by transformers. Bytes begin with the document start.

    Args:
        rows: requests answered at once.
        document_start: whether every text begins with the token that opens documents; None for that rule.

    Raises:
        RunError: the run has no tokenizer.
    """

    def __init__(self, run: OpenRun, *, rows: int = 8, document_start: bool | None = None):
        super().__init__()
        self.run, self.rows = run, rows
        self._ids = run.need_tokenizer()
        self._opening = int(self._ids.encode("", separator=True)[0])
        opens = getattr(self._ids, "opens", True)
        self._document_start = opens if document_start is None else document_start

    @property
    def eot_token_id(self) -> int:
        """That separates documents."""
        return self._ids.separator_id

    @property
    def prefix_token_id(self) -> int:
        """That opens a document."""
        return self._opening

    @property
    def tokenizer_name(self) -> str:
        """Of the run: what the harness caches requests by."""
        return str(self.run.workdir).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, after the one that opens documents where that is asked for."""
        start = self._document_start if add_special_tokens is None else add_special_tokens
        return self._ids.encode(string, separator=start).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found = self._score([(context, continuation) for _, context, continuation in requests])
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts: in one window, or in as many as learned positions allow."""
        pairs: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            limit = self.run.config.model.longest or max(len(ids), 1)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, limit, 1)
            pairs += [make_disjoint_window(window) for window in windows]
            owner += [number] * (len(pairs) - len(owner))
        sums = np.zeros(len(requests))
        np.add.at(sums, np.array(owner, np.int64), [one.logprob for one in self._score(pairs)])
        return sums.tolist()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string, without it."""
        generator, said = Generator(self.run, piece=PROMPT_PIECE), dict[int, str]()
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for settings, numbers in groups.items():
            new_tokens, stop, sampling = _settings(json.loads(settings))
            prompts = {i: self._prompt(requests[i].args[0], new_tokens) for i in numbers}
            order = sorted(numbers, key=lambda i: -len(prompts[i]))
            for first in range(0, len(order), self.rows):
                some = order[first : first + self.rows]
                done = generator.generate(
                    [prompts[i] for i in some], sampling, max_new_tokens=new_tokens, stop=stop
                )
                said |= {i: one.text or "" for i, one in zip(some, done)}
        return [said[i] for i in range(len(requests))]

    def _prompt(self, text: str, new_tokens: int) -> list[int]:
        """As much of the end of a prompt as there is room for."""
        ids = self.tok_encode(text) or [self._opening]
        limit = self.run.config.model.longest
        return ids if limit is None else ids[-max(limit - new_tokens, 1) :]

    def _score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """As much of the end of every pair as there is room for."""
        limit, kept = self.run.config.model.longest, []
        for context, continuation in pairs:
            room = len(context) if limit is None else max(limit + 1 - len(continuation), 1)
            kept.append((np.array(context[-room:], np.int32), np.array(continuation, np.int32)))
        return likelihoods(self.run, kept, rows=self.rows)


def _settings(given: dict[str, Any]) -> tuple[int, list[str], Sampling]:
    """New tokens, stop strings and sampling of a task's ``generation_kwargs``."""
    until = given.get("until") or []
    temperature = float(given.get("temperature", 1.0)) if given.get("do_sample") else 0.0
    return (
        int(given.get("max_gen_toks", NEW_TOKENS)),
        [until] if isinstance(until, str) else list(until),
        Sampling(temperature=temperature, top_p=float(given.get("top_p", 1.0))),
    )


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m eval.harness", allow_abbrev=False)
    add = options.add_argument
    add("--workdir", required=True, help="directory of the run")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--tasks", required=True, help="comma-separated names of the harness's tasks")
    add("--include_path", help="directory of further tasks, as YAML files")
    add("--num_fewshot", type=int, help="examples before each question (default: the task's)")
    add("--limit", type=float, help="at most so many questions of each task, or a share of them below 1")
    add("--rows", type=int, default=8, help="requests answered at once")
    add("--document_start", action=argparse.BooleanOptionalAction, help="open every text with that token")
    add("--out", help="JSON of the results (default: RUN/eval/STEP/harness.json)")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    given = parser().parse_args(argv)
    try:
        run = open_run(given.workdir, given.step)
        model = RunLM(run, rows=given.rows, document_start=given.document_start)
        found = evaluator.simple_evaluate(
            model,
            tasks=given.tasks.split(","),
            num_fewshot=given.num_fewshot,
            limit=given.limit,
            task_manager=TaskManager(include_path=given.include_path),
            log_samples=False,
        )
    except (RunError, ConfigError, ArchitectureError, CheckpointError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    out = epath.Path(given.out or run.workdir / "eval" / str(run.step) / "harness.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: found[key] for key in ("results", "n-shot", "versions", "n-samples") if key in found}
    out.write_text(json.dumps(kept, indent=1, default=str) + "\n")
    print(make_table(found))


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()

"""Text from a run: ``python -m eval.generate --workdir=RUN --prompt="def read("``.

From Python: ``Generator.open("runs/mine").generate(["def ", "class "], Sampling(temperature=0.8))``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int

from configs.base import ConfigError
from eval import decode
from eval.opened import OpenRun, RunError, open_run
from eval.sampling import Sampling
from runtime.checkpoint import ArchitectureError, CheckpointError
from runtime.host import restart_with_tuned_malloc
from tasks.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Listener = Callable[[int, str], None]  # (row, new text)


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed one prompt.

    Attributes:
        text: without the stop string; None if the run has no tokenizer.
        ids: all that were drawn, those of the stop string included, the final separator not.
        finished: "stop" (a stop string), "end" (the model ended the document) or "length".
    """

    text: str | None
    ids: Int[np.ndarray, " T"]
    finished: str


class Speed:
    """Of one call of ``generate``.

    Attributes:
        first_token: seconds until the first token of every row: compilation and the reading of the prompts.
        tokens_per_second: of all rows together, over the blocks after the first, which may have compiled;
            None if there were no further blocks.
    """

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens, self.new_tokens = prompt_tokens, 0
        self.first_token = 0.0
        self.tokens_per_second: float | None = None
        self._start, self._blocks, self._steady = time.perf_counter(), 0, 0.0

    def count(self, block: Int[np.ndarray, "B T"]) -> None:
        """A block has come."""
        now = time.perf_counter()
        self._blocks, self.new_tokens = self._blocks + 1, self.new_tokens + block.size
        if self._blocks == 1:
            self.first_token = now - self._start
        elif self._blocks == 2:
            self._steady, self._before = now, self.new_tokens
        else:
            self.tokens_per_second = (self.new_tokens - self._before) / (now - self._steady)

    def __str__(self) -> str:
        rate = "too few to time" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}/s"
        return (
            f"first token after {self.first_token:.2f} s (compiling, and {self.prompt_tokens} prompt "
            f"tokens); {self.new_tokens} new tokens, {rate}"
        )


class Generator:
    """A run that continues prompts; compiled once for a batch size and its settings.

    Attributes:
        speed: of the last call.
    """

    def __init__(self, run: OpenRun, *, piece: int = decode.PIECE):
        self.run, self._piece = run, piece
        self.speed: Speed | None = None

    @classmethod
    def open(cls, workdir: epath.PathLike, step: int | None = None) -> Generator:
        """Raises RunError and others as ``eval.opened.open_run``."""
        return cls(open_run(workdir, step))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        listen: Listener | None = None,
        max_len: int | None = None,
    ) -> list[Completion]:
        """Continue each prompt until a stop string, the end of the document, or ``max_new_tokens``.

        Args:
            prompts: text (as the start of a document), or ids, which are taken as they are.
            sampling: None for its defaults. A prompt's draws do not depend on the rest of the batch.
            stop: strings that end a row; they are not part of its text.
            listen: called with (row, text) as text is completed; nothing of a stop string reaches it.
            max_len: tokens an attention cache has room for; None for exactly enough.

        Raises:
            ValueError: no or an empty prompt, an empty stop string, ids that the model does not have.
            RoomError: a prompt and its continuation do not fit the cache or the learned positions.
            RunError: text is given or a stop string asked for, and the run has no tokenizer.
        """
        if "" in stop:
            raise ValueError("generate: a stop string is empty; it would stop at once")
        ids = [self._ids(i, prompt) for i, prompt in enumerate(prompts)]
        tokenizer = self.run.need_tokenizer() if stop else self.run.tokenizer
        rows = [_Row(i, tokenizer, tuple(stop), listen) for i in range(len(ids))]
        self.speed = Speed(sum(map(len, ids)))
        blocks = decode.decode(
            self.run.model,
            self.run.params,
            ids,
            max_new_tokens,
            sampling or Sampling(),
            max_len=max_len,
            piece=self._piece,
        )
        for block in blocks:
            self.speed.count(block)
            for row, tokens in zip(rows, block):
                row.take(tokens)
            if all(row.finished for row in rows):
                break
        return [row.completion() for row in rows]

    def _ids(self, number: int, prompt: Prompt) -> Int[np.ndarray, " L"]:
        if isinstance(prompt, str):
            return self.run.need_tokenizer().encode(prompt, separator=True)
        ids, limit = np.asarray(prompt, np.int64), self.run.config.model.vocab_size
        if ids.ndim != 1 or (ids.size and not 0 <= ids.min() <= ids.max() < limit):
            raise ValueError(f"generate: prompt {number} should be a list of ids in 0..{limit - 1}")
        return ids.astype(np.int32)


class _Row:
    """One row while it is made: its ids, its text, and what may already be shown."""

    def __init__(
        self, number: int, tokenizer: Tokenizer | None, stop: tuple[str, ...], listen: Listener | None
    ):
        self.number, self.finished = number, ""
        self._tokenizer, self._stop, self._listen = tokenizer, stop, listen
        self._ids: list[int] = []
        self._text, self._shown = "", 0
        self._feed = tokenizer.stream() if tokenizer is not None else None

    def take(self, tokens: Int[np.ndarray, " T"]) -> None:
        """Go on with ``tokens`` unless the row has ended."""
        for token in map(int, tokens):
            if self.finished:
                return
            if self._tokenizer is not None and token == self._tokenizer.separator_id:
                self.finished = "end"
                break
            self._ids.append(token)
            if self._feed is not None:
                self._append(self._feed([token]))
        self._show()

    def completion(self) -> Completion:
        """What has been made; a row that nothing ended ran into its length."""
        self._show(all_of_it=True)
        text = None if self._feed is None else self._text
        return Completion(text, np.array(self._ids, np.int32), self.finished or "length")

    def _append(self, text: str) -> None:
        if not text:
            return
        before = len(self._text)
        self._text += text
        longest = max((len(s) for s in self._stop), default=0)
        places = [self._text.find(s, max(before - longest, 0)) for s in self._stop]
        found = [place for place in places if place >= 0]
        if found:
            self._text, self.finished = self._text[: min(found)], "stop"

    def _show(self, all_of_it: bool = False) -> None:
        """Tell the listener what no stop string can take back any more."""
        if self._listen is None or self._feed is None:
            return
        held = 0
        if not (self.finished or all_of_it):
            longest = max((len(s) for s in self._stop), default=0)
            tails = range(min(longest - 1, len(self._text)), 0, -1)
            held = next((n for n in tails if any(s.startswith(self._text[-n:]) for s in self._stop)), 0)
        until = len(self._text) - held
        if until > self._shown:
            self._listen(self.number, self._text[self._shown : until])
            self._shown = until


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m eval.generate", allow_abbrev=False)
    add = options.add_argument
    add("--workdir", required=True, help="directory of the run")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--prompt", action="append", default=[], help="text to continue; repeat it for a batch")
    add("--prompt_file", action="append", default=[], help="a file whose whole text is a prompt")
    add("--samples", type=int, default=1, help="continuations of each prompt")
    add("--max_new_tokens", type=int, default=256, help="tokens after each prompt, at most")
    add("--stop", action="append", default=[], help="stop string; repeat it for any of several")
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="print text as it is made")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    add("--top_k", type=int, default=0, help="keep this many of the most likely; 0 for all")
    add("--top_p", type=float, default=1.0, help="keep the fewest whose probabilities add up to this")
    add("--min_p", type=float, default=0.0, help="keep those this share as likely as the most likely")
    add("--repetition_penalty", type=float, default=1.0, help="above 1 discourages repetition")
    add("--seed", type=int, default=0, help="of the draws")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parser()
    given = options.parse_args(argv)
    if given.samples < 1 or not (given.prompt or given.prompt_file):
        options.error("give --prompt or --prompt_file, and --samples of at least 1")
    try:
        prompts = given.prompt + [epath.Path(path).read_text() for path in given.prompt_file]
        sampling = Sampling(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Sampling)})
        generator = Generator.open(given.workdir, given.step)
        _print(generator, [p for p in prompts for _ in range(given.samples)], sampling, given)
    except (RunError, ConfigError, ArchitectureError, CheckpointError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _print(
    generator: Generator, prompts: Sequence[str], sampling: Sampling, given: argparse.Namespace
) -> None:
    stream = given.stream and len(prompts) == 1
    if stream:
        print(prompts[0], end="", flush=True)
    done = generator.generate(
        prompts,
        sampling,
        max_new_tokens=given.max_new_tokens,
        stop=given.stop,
        listen=(lambda row, text: print(text, end="", flush=True)) if stream else None,
    )
    for number, (prompt, completion) in enumerate(zip(prompts, done), 1):
        print() if stream else print(f"--- {number} of {len(prompts)} ---\n{prompt}{completion.text}")
    counts = {why: sum(c.finished == why for c in done) for why in ("stop", "end", "length")}
    reasons = ", ".join(f"{n} by {why}" for why, n in counts.items() if n)
    print(f"[step {generator.run.step}; {generator.speed}; ended {reasons}]", file=sys.stderr)
    if given.stop and not counts["stop"]:
        print(f"[no stop string of {given.stop} was reached]", file=sys.stderr)


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()

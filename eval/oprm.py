"""Answer from one chunk of a long text: ``python -m eval.oprm --workdir=RUN --text_file=F --query="..."``.

Overflow prevention (OPRM, arXiv:2505.07793): a state that overflows on a long text holds a chunk of it. Each
chunk is read by itself with the question after it, in one batch; the answer continues the chunk whose reading
is chosen by a criterion.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from configs.base import ConfigError
from eval.decode import decode
from eval.generate import Completion, Generator, Prompt
from eval.opened import RunError
from eval.sampling import Sampling
from models.functional import Functional
from runtime.checkpoint import ArchitectureError, CheckpointError
from runtime.host import restart_with_tuned_malloc

CRITERIA = ("entropy", "query")
PIECE = 1024  # tokens of each chunk read at once


@dataclasses.dataclass(frozen=True)
class Chosen:
    """An answer and where it is from.

    Attributes:
        completion: what followed the chosen chunk and the question.
        chunk: its number.
        entropy: nats of the distribution of the first token of the answer, by chunk.
        query: mean log-probability of the tokens of the question, by chunk.
        unanswered: chunks left out because they do not know.
    """

    completion: Completion
    chunk: int
    entropy: Float[np.ndarray, " n"]
    query: Float[np.ndarray, " n"]
    unanswered: tuple[int, ...]


def answer(
    generator: Generator,
    text: Prompt,
    query: Prompt,
    chunk: int,
    *,
    before: Prompt = "",
    criterion: str = "entropy",
    dont_know: Sequence[str] = (),
    sampling: Sampling | None = None,
    max_new_tokens: int = 64,
    stop: Sequence[str] = (),
) -> Chosen:
    """The continuation of ``before``, a chunk of ``text``, and ``query``.

    Args:
        text, query, before: text, or ids.
        chunk: tokens of ``text`` in a chunk; the last is shorter. The training length, less the others, or
            what the state is known to hold.
        criterion: "entropy" takes the chunk after which the first token of the answer is the surest, "query"
            that after which the question is the most likely.
        dont_know: beginnings of a greedy answer that say that a chunk does not hold it, as the prompt may
            demand of them ("Error"). Such chunks are left out, unless all of them are.
        sampling: of the answer; None takes the most likely tokens.
        max_new_tokens, stop: as for ``Generator.generate``.

    Raises:
        ValueError: chunk or criterion out of range, empty text or query.
        RunError: words are given, and the run has no tokenizer.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"oprm: criterion={criterion!r} is unknown; use one of {', '.join(CRITERIA)}")
    if chunk < 1:
        raise ValueError(f"oprm: chunk={chunk} should be at least 1 token")
    start, whole, asked = _ids(generator, before, True), _ids(generator, text), _ids(generator, query)
    if not len(whole) or not len(asked):
        raise ValueError("oprm: the text and the query should have at least one token each")
    if not len(start):
        raise ValueError("oprm: before has no token; give at least a separator")
    prompts = [np.concatenate([start, whole[i : i + chunk], asked]) for i in range(0, len(whole), chunk)]
    entropy, likely = readings(generator.run.model, generator.run.params, prompts, len(asked))
    silent = _unanswered(generator, prompts, dont_know)
    merit = -entropy if criterion == "entropy" else likely
    if len(silent) < len(prompts):
        merit = np.where(np.isin(np.arange(len(prompts)), silent), -np.inf, merit)
    best = int(np.argmax(merit))
    (completion,) = generator.generate(
        [prompts[best].tolist()],
        sampling or Sampling(temperature=0),
        max_new_tokens=max_new_tokens,
        stop=stop,
    )
    return Chosen(completion, best, entropy, likely, silent)


def readings(
    model: Functional, params: object, prompts: Sequence[Int[np.ndarray, " L"]], asked: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Of each prompt: entropy of what follows, and mean log-probability of its last ``asked`` tokens."""
    room = max(map(len, prompts))
    piece = room if model.bind(model.shapes).config.reads_whole else min(PIECE, room)
    width = -(-room // piece) * piece
    tokens, ids = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):  # padded on the left: the question is at the end of every row
        tokens[row, width - len(prompt) :], ids[row, width - len(prompt) :] = prompt, 1

    empty, read, judge = _programs(model)
    state, ends = empty(params, len(prompts), room), []
    for start in range(0, width, piece):
        part = slice(start, start + piece)
        hidden, state = read(params, tokens[:, part], ids[:, part], state)
        if start + piece > width - asked - 1:
            ends.append(hidden)
    last = jnp.concatenate(ends, axis=1)[:, -asked - 1 :]
    entropy, likely = judge(params, last, tokens[:, -asked:])
    return np.asarray(entropy), np.asarray(likely)


@functools.lru_cache(maxsize=4)
def _programs(model: Functional) -> tuple[Callable, Callable, Callable]:
    """Compiled: the empty state; hidden states of a piece and the state; what :func:`readings` returns."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def empty(params: object, rows: int, room: int) -> object:
        return model.bind(params).init_state(rows, room)

    @jax.jit
    def read(params: object, tokens: Array, ids: Array, state: object) -> tuple[Array, object]:
        hidden, state, _ = model.bind(params)(tokens, state, segment_ids=ids)
        return hidden, state

    @jax.jit
    def judge(params: object, hidden: Array, targets: Array) -> tuple[Array, Array]:
        lm = model.bind(params)

        def one(place: tuple[Array, Array]) -> Array:  # the logits of one place of all rows at a time
            log_p = jax.nn.log_softmax(lm.logits(place[0]))
            return jnp.take_along_axis(log_p, place[1][:, None], axis=-1)[:, 0]

        likely = jax.lax.map(one, (jnp.moveaxis(hidden[:, :-1], 1, 0), targets.T))
        log_p = jax.nn.log_softmax(lm.logits(hidden[:, -1]))
        return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), likely.mean(axis=0)

    return empty, read, judge


def _unanswered(generator: Generator, prompts: Sequence[np.ndarray], said: Sequence[str]) -> tuple[int, ...]:
    """The prompts whose greedy continuation begins with one of ``said``."""
    if not said:
        return ()
    tokenizer = generator.run.need_tokenizer()
    count = max(len(tokenizer.encode(words)) for words in said) + 1  # one more for white space before
    blocks = decode(generator.run.model, generator.run.params, prompts, count, Sampling(temperature=0))
    answers = [tokenizer.decode(row).lstrip() for row in np.concatenate(list(blocks), axis=1)]
    return tuple(i for i, text in enumerate(answers) if text.startswith(tuple(said)))


def _ids(generator: Generator, part: Prompt, first: bool = False) -> Int[np.ndarray, " L"]:
    if isinstance(part, str):
        return np.asarray(generator.run.need_tokenizer().encode(part, separator=first), np.int32)
    return np.asarray(part, np.int32)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    options = argparse.ArgumentParser("python -m eval.oprm", allow_abbrev=False)
    add = options.add_argument
    add("--workdir", required=True, help="directory of the run")
    add("--step", type=int, help="checkpoint to read (default: the newest)")
    add("--text_file", required=True, help="a file with the long text")
    add("--before", default="", help="what stands before each chunk")
    add("--query", required=True, help="what stands after each chunk: the question")
    add("--chunk", type=int, help="tokens a chunk (default: the training length, less --before and --query)")
    add("--criterion", default="entropy", choices=CRITERIA, help="how the chunk is chosen")
    add("--dont_know", action="append", default=[], help="beginning of an answer that leaves its chunk out")
    add("--max_new_tokens", type=int, default=64, help="tokens of the answer, at most")
    add("--stop", action="append", default=[], help="stop string; repeat it for any of several")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    given = parser().parse_args(argv)
    try:
        generator = Generator.open(given.workdir, given.step)
        chunk = given.chunk
        if chunk is None:
            around = sum(len(_ids(generator, part)) for part in (given.before, given.query))
            chunk = generator.run.config.task.seq_len - around
        chosen = answer(
            generator,
            epath.Path(given.text_file).read_text(),
            given.query,
            chunk,
            before=given.before,
            criterion=given.criterion,
            dont_know=given.dont_know,
            max_new_tokens=given.max_new_tokens,
            stop=given.stop,
        )
    except (RunError, ConfigError, ArchitectureError, CheckpointError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(chosen.completion.text, flush=True)
    print(
        f"[chunk {chosen.chunk} of {len(chosen.entropy)}: entropy {chosen.entropy[chosen.chunk]:.3f} nats, "
        f"question {chosen.query[chosen.chunk]:.3f} nats a token; {len(chosen.unanswered)} left out]",
        file=sys.stderr,
    )


if __name__ == "__main__":
    restart_with_tuned_malloc()
    main()

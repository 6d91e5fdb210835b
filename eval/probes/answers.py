"""What a run answers to prompts: each token of the right answer in turn, and what it says by itself.

As long as the most likely token is the right one, greedy decoding reads what teacher forcing reads; whether
it gives the answer is so seen without decoding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eval.decode import pieces
from eval.opened import OpenRun
from eval.probes.scoring import task_of
from eval.probes.types import NotApplicable, Say
from models.functional import Functional
from tasks.haystack.noise import CorpusText, sentences
from tasks.haystack.types import Noise, Sample
from tasks.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Reading:
    """Of one sample.

    Attributes:
        predicted: the most likely token at each place of the answer, and after it.
        nats: of each token of the answer.
        said: what greedy decoding gives; nothing if it was not asked for.
    """

    predicted: Int[np.ndarray, " n"]
    nats: Float[np.ndarray, " A"]
    said: Int[np.ndarray, " T"]

    def is_exact(self, sample: Sample, tokenizer: Tokenizer) -> bool:
        """Whether greedy decoding gives the answer, and ends a number where it ends if it has to."""
        *given, after = self.predicted
        more = sample.stops and tokenizer.decode([after])[:1].isdigit()
        return bool(np.array_equal(given, sample.answer)) and not more

    def text(self, tokenizer: Tokenizer, tokens: int) -> str:
        """What greedy decoding says in its first ``tokens`` tokens, up to the end of the document."""
        ends = np.flatnonzero(self.said[:tokens] == tokenizer.separator_id)
        return tokenizer.decode(self.said[: ends[0] if len(ends) else tokens])

    def digits(self, sample: Sample, tokenizer: Tokenizer) -> tuple[int, int]:
        """Digits of the answer that are right, the ones before them given, and how many it has."""
        size = np.array([sum(c.isdigit() for c in tokenizer.decode([token])) for token in sample.answer])
        return int(size[self.predicted[:-1] == sample.answer].sum()), int(size.sum())


def tokenizer_of(opened: OpenRun) -> Tokenizer:
    """Raises NotApplicable for a run without one."""
    if opened.tokenizer is None:
        raise NotApplicable(f"it writes text, and the run (of kind {opened.config.kind!r}) has no tokenizer")
    return opened.tokenizer


def noise_of(opened: OpenRun, noise: str) -> Noise | None:
    """Of the setting ``noise`` of a probe: None for "own"; the validation text; sentences made by rule."""
    if noise == "text":
        return CorpusText(task_of(opened).validation, tokenizer_of(opened))
    return sentences if noise == "sentences" else None


def lengths_of(opened: OpenRun, factors: Sequence[float]) -> tuple[dict[str, int], dict[str, str]]:
    """Prompt lengths by name ("2x" is twice the training length), and why some are left out."""
    limit, lengths, left_out = opened.config.model.longest, dict[str, int](), dict[str, str]()
    for factor in sorted(set(factors)):
        length = round(factor * opened.config.task.seq_len)
        if limit is not None and length > limit:
            left_out[f"{factor:g}x"] = f"{length} tokens, model.max_positions={limit}"
        else:
            lengths[f"{factor:g}x"] = length
    return lengths, left_out


def read(
    opened: OpenRun, samples: Sequence[Sample], say: Say, *, rows: int = 16, new_tokens: int = 0
) -> list[Reading]:
    """What the run makes of each sample.

    Prompts are read ``rows`` at a time, in pieces as long as validation rows with the state carried: memory
    does not grow with their length but for the cache of full attention, and nothing is compiled per length.

    Args:
        new_tokens: that greedy decoding gives; 0 for none.
    """
    task = opened.config.task
    shards = opened.mesh.shape["data"] * opened.mesh.shape["fsdp"]
    rows = -(-min(rows, len(samples)) // shards) * shards
    longest, answers = max(len(s.prompt) for s in samples), max(len(s.answer) for s in samples)
    piece = min(task.eval_seq_len or task.seq_len, longest)
    room, programs = longest + max(answers, new_tokens), _programs(opened.model, new_tokens)
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt))
    readings: dict[int, Reading] = {}
    for first in range(0, len(order), rows):
        some = order[first : first + rows]
        group = [samples[i] for i in some] + [samples[some[-1]]] * (rows - len(some))
        state, hidden = programs.start(opened.params, rows, room)
        for tokens, ids in pieces([s.prompt for s in group], piece):
            hidden, state = programs.read(opened.params, tokens, ids, state, hidden)
        answer = np.stack([np.pad(s.answer, (0, answers - len(s.answer))) for s in group])
        real = np.stack([np.arange(answers) < len(s.answer) for s in group]).astype(np.int32)
        predicted, nats = jax.device_get(programs.answer(opened.params, answer, real, state, hidden))
        said = np.zeros((rows, 0), np.int32)
        if new_tokens:
            said = np.asarray(programs.go_on(opened.params, state, hidden))
        for row, i in enumerate(some):
            count = len(samples[i].answer)
            readings[i] = Reading(predicted[row, : count + 1], nats[row, :count], said[row])
        say(f"{len(readings)} of {len(samples)} prompts, up to {len(group[-1].prompt)} tokens")
    return [readings[i] for i in range(len(samples))]


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Compiled functions: before any token; reading a piece; the answer given; what greedy decoding says."""

    start: Callable[..., tuple[Any, Array]]
    read: Callable[..., tuple[Array, Any]]
    answer: Callable[..., tuple[Array, Array]]
    go_on: Callable[..., Array]


@functools.lru_cache(maxsize=4)
def _programs(model: Functional, new_tokens: int) -> _Programs:
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def start(params: Any, rows: int, room: int) -> tuple[Any, Array]:
        lm = model.bind(params)
        return lm.init_state(rows, room), jnp.zeros((rows, lm.config.d_model), lm.config.dtype)

    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def read(params: Any, tokens: Array, ids: Array, state: Any, before: Array) -> tuple[Array, Any]:
        """Hidden state [B, D] of each row's last real token so far, and the state after it."""
        hidden, state, _ = model.bind(params)(tokens, state, segment_ids=ids)
        count = jnp.sum(ids != 0, axis=1)
        last = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return jnp.where((count > 0)[:, None], last, before).astype(before.dtype), state

    @jax.jit
    def answer(params: Any, tokens: Array, ids: Array, state: Any, before: Array) -> tuple[Array, Array]:
        """The most likely tokens [B, A + 1], and nats [B, A] of ``tokens``."""
        lm = model.bind(params)
        hidden, _, _ = lm(tokens, state, segment_ids=ids)
        logits = lm.logits(jnp.concatenate([before[:, None], hidden.astype(before.dtype)], axis=1))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[..., None], axis=-1)
        return jnp.argmax(logits, axis=-1), -picked[..., 0]

    @jax.jit
    def go_on(params: Any, state: Any, hidden: Array) -> Array:
        """The ``new_tokens`` most likely tokens, one after another, [B, T]."""
        lm = model.bind(params)
        lm.backbone.take_apart()

        def one(carry: tuple[Any, Array], _: None) -> tuple[tuple[Any, Array], Array]:
            state, hidden = carry
            token = jnp.argmax(lm.logits(hidden), axis=-1).astype(jnp.int32)
            after, state, _ = lm(token[:, None], state)
            return (state, after[:, -1].astype(hidden.dtype)), token

        _, tokens = jax.lax.scan(one, (state, hidden), None, length=new_tokens)
        return tokens.T

    return _Programs(start, read, answer, go_on)

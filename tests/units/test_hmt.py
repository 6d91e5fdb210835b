"""HMT: causality, packing, streaming in any split, generation, and what bad input is told."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.hmt import HMTExperiment
from eval.decode import decode
from eval.sampling import Sampling
from layers.attention import AttentionConfig
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from models.functional import Functional
from models.hmt import HMT
from models.hmt_config import HMTConfig, MemoryConfig
from models.hmt_segments import cut, part

S, K, VOCAB = 6, 2, 23
LENGTH = 27  # four segments and a half


def config(pattern="*", **memory):
    given = {"segment": S, "sensory": K, "queue": 3, "recall_dim": 5, "init_std": 0.5}
    return HMTConfig(
        vocab_size=VOCAB,
        d_model=16,
        pattern=pattern,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        mamba2=Mamba2Config(d_state=8, headdim=8, chunk_size=4),
        mlp=MLPConfig(hidden=16),
        init_std=0.3,
        memory=MemoryConfig(**{**given, **memory}),
    )


class Model:
    """A model with random parameters, compiled for the ways it is called."""

    def __init__(self, **given):
        self.config = config(**given)
        self.functional = functional = Functional.create(lambda rngs: HMT(self.config, rngs=rngs))
        self.params = functional.init(jax.random.key(1))

        @functools.partial(jax.jit, static_argnums=3)
        def run(tokens, ids, state, training):
            return functional.bind(self.params)(tokens, state, segment_ids=ids, training=training)

        self._run = run

    def __call__(self, tokens, ids=None, state=None, training=False):
        ids = np.ones_like(tokens) if ids is None else ids
        return self._run(jnp.asarray(tokens), jnp.asarray(ids), state, training)

    def state(self, batch):
        return self.functional.bind(self.params).init_state(batch, 1)


model = functools.cache(Model)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)


def close(actual, expected, atol=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol)


def in_pieces(m, tokens, lengths, state=None):
    """Hidden states of a row read in pieces of these lengths, with the state carried."""
    state, found, start = m.state(len(tokens)) if state is None else state, [], 0
    for length in lengths:
        hidden, state, _ = m(tokens[:, start : start + length], state=state)
        found.append(hidden)
        start += length
    assert start == tokens.shape[1]
    return np.concatenate(found, axis=1), state


def padded_pieces(m, tokens, lengths, columns):
    """The same, each piece right-padded to ``columns``: row r takes lengths[r], one after another."""
    batch, count = len(tokens), max(map(len, lengths))
    state, place = m.state(batch), np.zeros(batch, int)
    found = [[] for _ in range(batch)]
    for n in range(count):
        piece, ids = np.zeros((2, batch, columns), np.int32)
        sizes = [row[n] if n < len(row) else 0 for row in lengths]
        for row, size in enumerate(sizes):
            piece[row, :size] = tokens[row, place[row] : place[row] + size]
            ids[row, :size] = 1
        hidden, state, _ = m(piece, ids, state)
        for row, size in enumerate(sizes):
            found[row].append(hidden[row, :size])
        place += sizes
    return [np.concatenate(row) for row in found]


SPLITS = ([7, 7, 7, 6], [1, 5, 6, 2, 3, 7, 3])  # of two rows, out of phase with each other


@pytest.mark.parametrize("pattern", ["*", "M-"])
def test_any_split_is_one_pass(pattern):
    m = model(pattern=pattern, query="previous")
    whole, none, _ = m(TOKENS)
    assert none is None
    for row, found in enumerate(padded_pieces(m, TOKENS, SPLITS, 7)):
        close(found, whole[row, : len(found)])


def test_token_by_token_is_one_pass():
    m = model(query="previous")
    found, state = in_pieces(m, TOKENS, [1] * LENGTH)
    close(found, m(TOKENS)[0])
    assert state["queue"]["count"].tolist() == [4, 4] and state["phase"].tolist() == [3, 3]


def test_the_papers_query_in_pieces_of_whole_segments_is_one_pass():
    m = model(query="current")
    whole = m(TOKENS)[0]
    for row, found in enumerate(padded_pieces(m, TOKENS, ([12, 12, 3], [6, 12, 6, 3]), 12)):
        close(found, whole[row])


def changed(tokens, at):
    return np.where(np.arange(LENGTH) == at, (tokens + 1) % VOCAB, tokens)


@pytest.mark.parametrize("query", ["previous", "current"])
def test_causality(query):
    m = model(query=query)
    before = np.asarray(m(TOKENS)[0])
    for at in (1, 7, 10, 14, 23):
        differs = (np.asarray(m(changed(TOKENS, at))[0]) != before).any(axis=(0, 2))
        start = at // S * S
        # The paper's query looks ahead within the first half of a segment, where there is a choice to make.
        looks = query == "current" and at - start < S // 2 and start > S
        first = start if looks else at
        assert differs[first:].all() and not differs[:first].any(), (at, differs)


def test_the_memory_reaches_every_later_segment_and_without_recall_none():
    for recall, reached in (("last", True), ("none", False)):
        m = model(recall=recall, sensory=0, query="previous")
        differs = (np.asarray(m(changed(TOKENS, 1))[0]) != np.asarray(m(TOKENS)[0])).any(axis=(0, 2))
        assert differs[1:S].all() and differs[S:].all() == differs[S:].any() == reached


def test_a_full_queue_forgets_the_oldest():
    m = model(queue=1, sensory=0, query="previous")
    last = model(recall="last", sensory=0, query="previous")
    close(m(TOKENS)[0], last(TOKENS)[0])  # one memory has all the weight


DOCUMENTS = (13, 8, 6)


def packed_and_apart():
    """One row of three documents between rows of nothing, and the same documents a row each."""
    packed, apart = np.zeros((2, 2, 3, LENGTH), np.int32)
    ends = np.cumsum(DOCUMENTS)
    for n, (end, size) in enumerate(zip(ends, DOCUMENTS)):
        text = TOKENS[0, end - size : end]
        packed[0, 1, end - size : end], packed[1, 1, end - size : end] = text, 5 + n
        apart[0, n, 3 : 3 + size], apart[1, n, 3 : 3 + size] = text, 1  # between padding
    rows = [apart[1, n] != 0 for n in range(3)]
    return packed, apart, rows


def test_packed_documents_are_separate_runs():
    m = model(documents=3, query="current")
    packed, apart, rows = packed_and_apart()

    @jax.jit
    def loss(params, tokens, ids):
        def total(params):
            hidden, _, out = m.functional.bind(params)(tokens, segment_ids=ids, training=True)
            return jnp.where(out["read"][..., None], jnp.sin(hidden), 0).sum(), (hidden, out["read"])

        return jax.grad(total, has_aux=True)(params)

    grads, (together, read) = loss(m.params, *packed)
    expected, (alone, _) = loss(m.params, *apart)
    np.testing.assert_array_equal(read, packed[1] != 0)
    alone = np.concatenate([np.asarray(alone)[n][row] for n, row in enumerate(rows)])
    close(together[1], alone)
    jax.tree.map(lambda g, e: close(g, e, atol=1e-4), grads, expected)
    evaluated, _, _ = m(*packed)
    close(evaluated[1], alone)
    assert not np.asarray(evaluated[0]).any()


def test_what_the_steps_do_not_reach_is_never_silently_wrong():
    m = model(query="previous")  # documents=1: five steps, six are needed
    packed, _, _ = packed_and_apart()
    hidden, _, out = m(*packed, training=True)
    lost = (packed[1] != 0) & ~np.asarray(out["read"])
    assert lost.sum() == 6 and lost[1, -6:].all()
    np.testing.assert_array_equal(np.isnan(np.asarray(hidden)).all(axis=-1), lost)


def test_training_with_a_carried_state_is_one_pass_and_begins_with_a_segment():
    m = model(query="current")
    first, state, _ = m(TOKENS[:, :12], state=m.state(2), training=True)
    second, state, _ = m(TOKENS[:, 12:24], state=state, training=True)
    close(np.concatenate([first, second], axis=1), m(TOKENS)[0][:, :24])
    within = {**state, "phase": jnp.array([0, 1])}
    hidden, _, out = m(TOKENS[:, 12:24], state=within, training=True)
    assert np.isnan(np.asarray(hidden)).all(axis=(1, 2)).tolist() == [False, True]
    assert np.asarray(out["read"]).all(axis=1).tolist() == [True, False]


def test_bptt_depth():
    """With depth 2, segment 3 sends gradients into the memory of segment 2, and of no earlier one."""
    m = model(bptt_depth=2, query="previous")

    @jax.jit
    def gradient(params):
        def fourth(params):
            hidden, _, _ = m.functional.bind(params)(jnp.asarray(TOKENS), training=True)
            return jnp.sin(hidden[:, 3 * S : 4 * S]).sum()

        return jax.grad(fourth)(params)["memory"]

    found = gradient(m.params)
    assert not np.asarray(found["prompt"]).any()  # P_0 is read by segment 0 alone
    assert np.abs(found["wk"]["kernel"]).max() > 1e-6


def test_the_state_has_one_size_and_counts_rows_first():
    m = model(query="previous")
    lm = m.functional.bind(m.params)
    sizes = [jax.eval_shape(lambda n=n: lm.init_state(2, n)) for n in (1, 10**6)]
    assert sizes[0] == sizes[1]
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(sizes[0]))


PROMPTS = [np.arange(1, 12) % VOCAB, np.arange(3, 7), np.arange(40) % VOCAB]


def test_uneven_prompts_in_a_batch_generate_as_alone():
    m = model(query="current")

    def ids_of(prompts):
        blocks = decode(m.functional, m.params, prompts, 15, Sampling(temperature=0), piece=2 * S, steps=7)
        return np.concatenate(list(blocks), axis=1)

    together = ids_of(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(together[row], ids_of([PROMPTS[2], prompt, prompt])[1])


def test_segments_of_a_piece():
    ids = np.array([[0, 7, 7, 7, 7, 7, 9, 9, 9, 9], [4, 4, 4, 4, 4, 4, 4, 4, 0, 0]])
    segments = jax.jit(cut, static_argnums=3)(jnp.asarray(ids), jnp.array([7, 3]), jnp.array([2, 1]), 4)
    assert segments.step.tolist() == [[-1, 0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1, -1, -1]]
    assert segments.count.tolist() == [3, 2] and segments.document.tolist() == [9, 4]
    assert segments.end.tolist() == [0, 0]
    read = jax.jit(part, static_argnums=3)
    second = read(segments, jnp.asarray(ids * 10 + np.arange(10)), 1, 4)
    assert second.tokens[0, :3].tolist() == [73, 74, 75] and second.count.tolist() == [3, 4]
    assert second.opens.tolist() == [True, True] and second.closes.tolist() == [False, True]
    third = read(segments, jnp.asarray(ids), 2, 4)
    assert third.fresh.tolist() == [True, False] and third.count.tolist() == [4, 0]


@pytest.mark.parametrize(
    "memory, field",
    [
        ({"queue": 0}, "memory.queue=0"),
        ({"segment": 0}, "memory.segment=0"),
        ({"sensory": S}, "memory.sensory=6 must be below model.memory.segment=6"),
        ({"summary_fraction": 0.0}, "memory.summary_fraction=0.0"),
        ({"summary_fraction": 1.5}, "memory.summary_fraction=1.5"),
        ({"summary_fraction": 0.01}, "memory.summary_fraction=0.01 .* is 0"),
        ({"recall": "all"}, "memory.recall='all' .*'attention', 'last', 'none'"),
        ({"query": "next"}, "memory.query='next'"),
        ({"bptt_depth": 0}, "memory.bptt_depth=0"),
        ({"documents": 0}, "memory.documents=0"),
    ],
)
def test_a_memory_that_cannot_work_is_refused(memory, field):
    with pytest.raises(ValueError, match=field):
        config(**memory).validate()


def test_a_backbone_that_does_not_fit_is_refused():
    short = dataclasses.replace(config(), max_positions=9)
    with pytest.raises(ValueError, match="model.max_positions=9 .* 10 slots .* at most 5"):
        short.validate()
    short.max_positions = 10
    short.validate()
    short.attention.causal = False
    with pytest.raises(ValueError, match="model.attention.causal=False"):
        short.validate()
    lm = model(query="previous")
    with pytest.raises(ValueError, match="found .*zigzag"):
        lm.functional.bind(lm.params)(jnp.asarray(TOKENS), sequence_layout="zigzag")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packing": "docs"}, "task.packing='docs' .* model.memory.documents=1"),
        ({"packing": "docs", "carry_state": True}, "task.carry_state=True .*found 'docs'"),
        ({"seq_len": 20, "carry_state": True}, "multiple of model.memory.segment=6 .*found 20"),
        ({"seq_len": 6}, "task.seq_len=6 is not above model.memory.segment=6"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(changes, message):
    experiment = HMTExperiment(model=config())
    experiment.task.packing, experiment.task.seq_len = "stream", 24
    experiment.validate()
    for name, value in changes.items():
        setattr(experiment.task, name, value)
    with pytest.raises(ValueError, match=message):
        experiment.validate()
    experiment = HMTExperiment(model=config(), loss_segments=0)
    with pytest.raises(ValueError, match="loss_segments=0"):
        experiment.validate()

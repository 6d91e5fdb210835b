"""Packing: batches are pure in the step, every target appears once per epoch, carried rows continue."""

import numpy as np
import pytest

from tasks.corpus import Corpus
from tasks.packing import Layout, Packer

SIZES = (3, 40, 1, 17, 90, 5, 5, 26, 61, 2, 11)
# Two bytes name a pair: document number, place in it. No (token, target) pair occurs twice but at the ends.
DOCUMENTS = [bytes([10 + d, *range(100, 100 + n - 1)]) for d, n in enumerate(SIZES)]
CORPUS = Corpus.from_documents(DOCUMENTS)
LAYOUTS = [Layout(4, 8, packing, carry) for packing in ("docs", "stream") for carry in (False, True)]


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def targets_of(batches):
    return np.sort(np.concatenate([b["targets"][b["weights"] > 0] for b in batches]))


def test_corpus_puts_a_separator_before_and_after_every_document():
    tokens, targets, positions = Corpus.from_documents([b"ab", b"", b"c"]).pairs()
    np.testing.assert_array_equal(tokens, [256, 97, 98, 256, 99])
    np.testing.assert_array_equal(targets, [97, 98, 256, 99, 256])
    np.testing.assert_array_equal(positions, [0, 1, 2, 0, 1])


@pytest.mark.parametrize("at", [0, 1, 4, 30, CORPUS.targets])
def test_split_gives_every_target_to_one_side(at):
    head, rest = CORPUS.split(at)
    both = np.concatenate([head.pairs()[1], rest.pairs()[1]])
    assert head.targets == at
    np.testing.assert_array_equal(both, CORPUS.pairs()[1])


def test_shards_and_separators_give_the_documents_back():
    array = CORPUS.shards[0]
    again = Corpus.from_arrays([array], separator_id=256)
    np.testing.assert_array_equal(again.starts, CORPUS.starts)
    np.testing.assert_array_equal(again.lengths, CORPUS.lengths)
    cut = int(CORPUS.starts[4])
    shards = Corpus.from_arrays([array[: cut + 1], array[cut:]], separator_id=256)
    for one, two in zip(shards.pairs(), CORPUS.pairs()):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_batches_are_pure_in_the_step(layout):
    dataset = Packer(CORPUS, layout, seed=3).dataset()
    steps = [0, 7, 3, 40, 3, 1000, 0, 7]
    first = {s: dataset[s] for s in steps}
    other = Packer(CORPUS, layout, seed=3).dataset()
    for s in reversed(steps):
        assert equal(first[s], other[s])
        assert equal(first[s], dataset[s])
    assert not equal(first[3], Packer(CORPUS, layout, seed=4).dataset()[3])
    assert equal(first[7], next(iter(dataset[7:].to_iter_dataset())))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("parts", [2, 4])
def test_rows_equal_rows_of_the_whole_batch(layout, parts):
    packer = Packer(CORPUS, layout, seed=0)
    size = layout.batch_size // parts
    pieces = [packer.dataset(slice(i * size, (i + 1) * size)) for i in range(parts)]
    for step in (0, 5, 11, 23):
        whole = packer.dataset()[step]
        joined = [p[step] for p in pieces]
        assert equal(whole, {k: np.concatenate([j[k] for j in joined]) for k in whole})


@pytest.mark.parametrize("rows", [slice(2, 2), slice(0, 5), slice(0, 4, 2)])
def test_impossible_rows_are_refused(rows):
    with pytest.raises(ValueError, match=r"0\.\.4"):
        Packer(CORPUS, LAYOUTS[0], seed=0).dataset(rows)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_epoch_holds_every_target_once_and_the_next_differs(layout):
    packer = Packer(CORPUS, layout, seed=1)
    if layout.carry_state:
        steps, rows = packer.steps_per_epoch, layout.batch_size
    else:  # epochs end inside a batch; lcm(windows, B) / B batches are a whole number of epochs
        steps, rows = -(-CORPUS.targets // layout.seq_len), layout.batch_size
    epochs = 1 if layout.carry_state else rows
    dataset, expected = packer.dataset(), np.sort(np.tile(CORPUS.pairs()[1], epochs))
    one = [dataset[s] for s in range(steps)]
    two = [dataset[s] for s in range(steps, 2 * steps)]
    np.testing.assert_array_equal(targets_of(one), expected)
    np.testing.assert_array_equal(targets_of(two), expected)
    assert not equal(one[0], two[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_once_covers_every_target_once_and_pads_the_end(layout):
    packer = Packer(CORPUS, layout, seed=0, once=True)
    dataset = packer.dataset()
    batches = [dataset[i] for i in range(len(dataset))]
    np.testing.assert_array_equal(targets_of(batches), np.sort(CORPUS.pairs()[1]))
    for batch in batches:
        assert batch["tokens"].shape == (4, 8)
        np.testing.assert_array_equal(batch["segment_ids"] > 0, batch["weights"] > 0)
        assert all((batch[k][batch["weights"] == 0] == 0).all() for k in batch)
    assert len(packer.dataset(limit=2)) == 2


@pytest.mark.parametrize("seed", range(3))
def test_document_packing_numbers_segments_and_positions(seed):
    batch = Packer(CORPUS, Layout(32, 16), seed=seed).batch(0)
    tokens, targets, ids, positions = (batch[k] for k in ("tokens", "targets", "segment_ids", "positions"))
    real = batch["weights"] > 0
    starts = np.diff(ids, axis=1) != 0
    inner = real[:, 1:] & real[:, :-1]
    assert (ids[:, 0] == 1).all()
    np.testing.assert_array_equal((tokens == 256) & real, (positions == 0) & real)
    np.testing.assert_array_equal(starts & inner, (tokens[:, 1:] == 256) & inner)
    np.testing.assert_array_equal(targets[:, :-1][inner], tokens[:, 1:][inner])
    np.testing.assert_array_equal(
        positions[:, 1:][inner], np.where(starts[inner], 0, positions[:, :-1][inner] + 1)
    )
    # A piece of a long document keeps its place: bytes 100, 101, ... stand at positions 2, 3, ...
    body = real & (tokens >= 100) & (tokens < 256)
    np.testing.assert_array_equal(positions[body], tokens[body] - 98)


def test_stream_packing_is_one_segment_a_row():
    batch = Packer(CORPUS, Layout(4, 8, "stream"), seed=0).batch(0)
    np.testing.assert_array_equal(batch["segment_ids"], batch["weights"])
    np.testing.assert_array_equal(batch["positions"], np.arange(8) * (batch["weights"] > 0))


@pytest.mark.parametrize("packing", ["docs", "stream"])
def test_carried_rows_continue(packing):
    layout = Layout(3, 8, packing, carry_state=True)
    packer = Packer(CORPUS, layout, seed=5)
    steps = packer.steps_per_epoch
    batches = [packer.batch(s) for s in range(2 * steps)]
    whole = {k: np.concatenate([b[k] for b in batches], axis=1) for k in batches[0]}
    for row in range(3):
        real = np.flatnonzero(whole["weights"][row])
        tokens, targets, ids, positions = (
            whole[k][row, real] for k in ("tokens", "targets", "segment_ids", "positions")
        )
        epoch = real // (steps * 8)
        same = np.diff(epoch) == 0
        np.testing.assert_array_equal(targets[:-1][same], tokens[1:][same])
        new = np.diff(ids) != 0
        np.testing.assert_array_equal(positions[1:][~new], positions[:-1][~new] + 1)
        opens = tokens[1:] == 256 if packing == "docs" else np.zeros_like(same)
        np.testing.assert_array_equal(new, np.where(same, opens, True))
        assert (ids > 0).all()


def test_a_tiny_corpus_may_be_passed_over_within_one_batch():
    small = Corpus.from_documents([b"hello"])
    batch = Packer(small, Layout(4, 4), seed=0).batch(0)
    np.testing.assert_array_equal(targets_of([batch]), np.sort(np.tile(small.pairs()[1], 2)))


def test_layout_errors_name_the_field():
    with pytest.raises(ValueError, match=r"task\.seq_len.*0"):
        Layout(4, 0)
    with pytest.raises(ValueError, match=r"task\.batch_size.*-1"):
        Layout(-1, 4)
    with pytest.raises(ValueError, match=r"task\.packing.*'docs', 'stream'.*'pack'"):
        Layout(4, 4, "pack")


@pytest.mark.parametrize("length, carry", [(2**24 + 1, False), (2**31, True)])
def test_positions_that_would_not_be_exact_are_refused(length, carry):
    giant = Corpus((np.zeros(2, np.uint16),), np.array([0]), np.array([length]))
    with pytest.raises(ValueError, match=rf"{length}.*task\.separator_id.*task\.packing"):
        Packer(giant, Layout(1, 8, "docs", carry), seed=0)
    Packer(giant, Layout(2, 8, "stream", carry), seed=0)

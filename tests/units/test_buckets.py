"""Length buckets: every target once an epoch, pieces of one document, equal sizes, pure in the step."""

import jax
import numpy as np
import pytest

import train
from configs.base import ConfigError
from eval.curves import read_records
from runtime.feed import Feed
from runtime.mesh import MeshConfig, batch_sharding
from tasks.buckets import BucketPacker, Curriculum
from tasks.corpus import Corpus
from tasks.lm import LMTask
from tasks.packing import Layout
from tests.experiments import tiny, write_corpus

SIZES = (3, 40, 1, 17, 90, 5, 5, 26, 61, 2, 11, 200, 64, 33)
# Two bytes name a pair: document number, place in it (below 100).
DOCUMENTS = [bytes([d, *(100 + i % 100 for i in range(n - 1))]) for d, n in enumerate(SIZES)]
CORPUS = Corpus.from_documents(DOCUMENTS)
LAYOUT = Layout(2, 32, "buckets")


def packer(order="grow_p2", cycles=2, shortest=4, corpus=CORPUS, layout=LAYOUT, seed=0):
    return BucketPacker(corpus, layout, Curriculum(shortest, order, cycles), seed=seed)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("order", ["shuffled", "uniform", "grow_linear", "grow_p2", "5:1:1:2"])
def test_an_epoch_holds_every_target_once_and_the_next_differs(order):
    p = packer(order)
    steps = p.steps_per_epoch
    epochs = [[p.dataset()[s] for s in range(e * steps, (e + 1) * steps)] for e in (0, 1)]
    tokens, targets, _ = CORPUS.pairs()
    for epoch in epochs:
        found = [np.stack([b["tokens"], b["targets"]], -1)[b["weights"] > 0] for b in epoch]
        found = np.concatenate(found)
        np.testing.assert_array_equal(
            np.sort(found[:, 0] * 1000 + found[:, 1]), np.sort(tokens * 1000 + targets)
        )
    assert not all(equal(a, b) for a, b in zip(*epochs))


def test_batches_have_rows_of_one_length_and_equal_size():
    p = packer()
    shapes = {p.batch(s)["tokens"].shape for s in range(p.steps_per_epoch)}
    assert shapes == {(16, 4), (8, 8), (4, 16), (2, 32)}
    assert sum(p.length_shares.values()) == pytest.approx(1)
    assert set(p.length_shares) == {4, 8, 16, 32}


def test_rows_are_pieces_of_one_document():
    """Longer rows hold one document each; the shortest may hold the ends of several, a segment each."""
    p = packer()
    for step in range(p.steps_per_epoch):
        batch = p.batch(step)
        tokens, targets, ids, positions, weights = (
            batch[k] for k in ("tokens", "targets", "segment_ids", "positions", "weights")
        )
        np.testing.assert_array_equal(ids > 0, weights > 0)
        inner = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
        np.testing.assert_array_equal(targets[:, :-1][inner], tokens[:, 1:][inner])
        np.testing.assert_array_equal(positions[:, 1:][inner], positions[:, :-1][inner] + 1)
        if tokens.shape[1] > 4:
            assert set(np.unique(ids)) <= {0, 1}
            assert (ids == ids[:, :1]).all() and (
                positions[ids > 0].reshape(-1, tokens.shape[1])[:, 0] == 0
            ).all()


def test_documents_are_cut_by_their_binary_expansion():
    one = Corpus.from_documents([bytes(range(76))])  # 77 pairs = 2 * 32 + 8 + 4 + 1
    p = packer(corpus=one)
    rows = {length: [] for length in (4, 8, 16, 32)}
    for step in range(p.steps_per_epoch):
        batch = p.batch(step)
        real = batch["weights"][:, 0] > 0
        rows[batch["tokens"].shape[1]] += batch["targets"][real, 0].tolist()
    assert {k: sorted(v) for k, v in rows.items()} == {32: [0, 32], 16: [], 8: [64], 4: [72, 256]}


def test_batches_are_pure_in_the_step_and_rows_are_those_of_the_batch():
    p, other = packer(seed=3), packer(seed=3)
    steps = [0, 7, 3, 40, 3, 500]
    first = {s: p.dataset()[s] for s in steps}
    for s in reversed(steps):
        assert equal(first[s], other.dataset()[s])
        halves = [other.dataset(slice(i, i + 1))[s] for i in (0, 1)]
        assert equal(first[s], {k: np.concatenate([h[k] for h in halves]) for k in halves[0]})
    assert not all(equal(first[s], packer(seed=4).batch(s)) for s in steps)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        p.dataset(slice(0, 3))


def test_lengths_grow_in_every_cycle():
    rng = np.random.default_rng(0)
    corpus = Corpus.from_documents([bytes(int(n)) for n in rng.integers(1, 200, 1500)])
    means = {}
    for order in ("shuffled", "grow_p2", "1:2:4:8"):
        p = packer(order, cycles=3, corpus=corpus)
        lengths = np.array([p.batch(s)["tokens"].shape[1] for s in range(p.steps_per_epoch)])
        cycles = np.array_split(np.log2(lengths), 3)
        means[order] = [c[len(c) // 2 :].mean() - c[: len(c) // 2].mean() for c in cycles]
        assert np.ptp([c.mean() for c in cycles]) < 0.1, "cycles hold equal parts of every bucket"
    assert min(means["grow_p2"]) > 0.5 > max(np.abs(means["shuffled"]))
    assert np.mean(means["1:2:4:8"]) < np.mean(means["grow_p2"])


def test_errors_name_the_field():
    for make, message in (
        (lambda: packer(layout=Layout(2, 24)), r"task\.seq_len=24 should be a power of two.*16"),
        (lambda: packer(shortest=3), r"task\.shortest_seq_len=3 should be a power of two.*2"),
        (lambda: packer(shortest=64), r"task\.shortest_seq_len=64 should be at most task\.seq_len=32"),
        (lambda: packer(cycles=0), r"task\.curriculum_cycles=0"),
        (lambda: packer("short"), r"task\.curriculum='short'.*'grow_p2'.*4 positive odds.*4:3:2:1"),
        (lambda: packer("1:2"), r"task\.curriculum='1:2'"),
        (lambda: packer(layout=Layout(2, 32, carry_state=True)), r"task\.carry_state=True"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def bucketed(corpus, mesh):
    config = tiny(corpus, mesh=mesh, steps=5)
    config.model.pattern = "-"  # compiles soonest
    config.task.packing, config.task.shortest_seq_len = "buckets", 16
    config.task.curriculum, config.task.curriculum_cycles = "1000:1", 1  # all short rows first
    config.checkpoint.every = 0
    return config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def test_a_run_trains_on_buckets(corpus, tmp_path):
    config = bucketed(corpus, MeshConfig(1))
    train.run(config, tmp_path / "run", jax.devices()[:1])
    records = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    data = LMTask(config.task).train()
    assert {data[s]["tokens"].shape for s in range(5)} == {(8, 32), (16, 16)}
    assert [r["train/weight"] for r in records] == [data[s]["weights"].sum() for s in range(5)]
    assert records[-1]["train/loss"] < records[0]["train/loss"]


def test_every_shape_is_fed_to_a_mesh(corpus, mesh):
    config = bucketed(corpus, MeshConfig(2, 1, 1, 2)).task
    data, sharding = LMTask(config).train(), batch_sharding(mesh(2, 1, 1, 2))
    with Feed(data, sharding, config.batch_size, end_step=8, prefetch=0) as feed:
        shapes = set()
        for step, batch in feed:
            for name, array in batch.items():
                np.testing.assert_array_equal(array, data[step][name])
                assert array.sharding.is_equivalent_to(sharding, 2)
            shapes.add(batch["tokens"].shape)
    assert shapes == {(8, 32), (16, 16)}


def test_the_shortest_rows_are_checked_against_the_mesh(corpus):
    config = bucketed(corpus, MeshConfig(1, 1, 1, 8))
    config.task.shortest_seq_len, config.task.curriculum = 4, "uniform"
    with pytest.raises(ConfigError, match=r"task\.shortest_seq_len=4 must be a multiple of mesh\.sequence=8"):
        train.setup(config, jax.devices())

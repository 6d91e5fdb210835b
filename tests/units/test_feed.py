"""Batches on the devices: right on every mesh, in order, a few steps ahead, and no thread left behind."""

import gc
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from runtime.feed import DataError, Feed, global_batch, local_rows

B, L = 8, 16
SPEC = PartitionSpec(("data", "fsdp"), "sequence")


class Counting:
    """Batch s has tokens 1000 s + 100 row + column; remembers what was asked for."""

    def __init__(self, fails_at=None, delay=0.0):
        self.asked, self.fails_at, self.delay = [], fails_at, delay

    def __getitem__(self, step):
        self.asked.append(step)
        time.sleep(self.delay)
        if step == self.fails_at:
            raise OSError("shard 3 is gone")
        tokens = 1000 * step + 100 * np.arange(B)[:, None] + np.arange(L)[None]
        return {"tokens": tokens.astype(np.int32), "label": np.arange(B, dtype=np.int32) + step}


def feed_threads():
    return [t for t in threading.enumerate() if t.name == "feed"]


@pytest.fixture(autouse=True)
def no_leaked_threads():
    yield
    assert feed_threads() == []


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 4, 1, 1), (2, 1, 2, 2), (1, 1, 1, 8), (1, 2, 4, 1)])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_same_batches_on_every_mesh(mesh, shape, prefetch):
    sharding = NamedSharding(mesh(*shape), SPEC)
    data = Counting()
    with Feed(data, sharding, B, start_step=5, end_step=9, prefetch=prefetch) as feed:
        seen = list(feed)
    assert [step for step, _ in seen] == [5, 6, 7, 8] == data.asked
    for step, batch in seen:
        assert batch["tokens"].sharding == sharding and batch["tokens"].dtype == np.int32
        assert batch["label"].sharding.spec == PartitionSpec(("data", "fsdp"))
        for name, expected in Counting()[step].items():
            np.testing.assert_array_equal(batch[name], expected)


def test_stays_a_few_steps_ahead_and_no_more(mesh):
    data = Counting()
    with Feed(data, NamedSharding(mesh(1, 1, 1, 1), SPEC), B, prefetch=3) as feed:
        assert next(feed)[0] == 0
        deadline = time.monotonic() + 5
        while len(data.asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        # One taken, three waiting, one in the hands of the thread.
        assert data.asked == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_comes_in_its_turn_and_names_the_step(mesh, prefetch):
    feed = Feed(Counting(fails_at=2), NamedSharding(mesh(2, 1, 1, 1), SPEC), B, prefetch=prefetch)
    assert [next(feed)[0], next(feed)[0]] == [0, 1]
    with pytest.raises(
        DataError, match="batch of step 2 could not be loaded: OSError: shard 3 is gone"
    ) as error:
        next(feed)
    assert isinstance(error.value.__cause__, OSError)
    with pytest.raises(StopIteration):
        next(feed)


def test_wrong_shapes_name_the_array(mesh):
    sharding = NamedSharding(mesh(2, 1, 1, 4), SPEC)
    with pytest.raises(ValueError, match=r"tokens has shape \(6, 4\), expected 8 rows"):
        global_batch({"tokens": np.zeros((6, 4))}, sharding, B, slice(0, B))
    with pytest.raises(ValueError, match=r"tokens of global shape \(8, 6\) cannot be sharded"):
        global_batch({"tokens": np.zeros((8, 6))}, sharding, B, slice(0, B))
    with pytest.raises(ValueError):
        local_rows(sharding, 7)
    with pytest.raises(ValueError, match="prefetch is -1"):
        Feed(Counting(), sharding, B, prefetch=-1)


def test_rows_of_one_process_are_all_of_them(mesh):
    assert local_rows(NamedSharding(mesh(2, 2, 2, 1), SPEC), B) == slice(0, B)


def test_part_of_the_rows_goes_to_its_place(mesh):
    """As on a process that owns rows 4 to 8 only: the others are never asked for."""
    small = mesh(1, 1, 2, 1)
    rows = slice(4, 8)
    local = Counting()[1]["tokens"][rows]
    whole = global_batch({"tokens": local}, NamedSharding(small, SPEC), 4, slice(0, 4))["tokens"]
    np.testing.assert_array_equal(whole, local)
    wanted = np.concatenate([np.zeros((4, L), np.int32), local])

    def piece(index):
        start, stop, _ = index[0].indices(B)
        return wanted[start:stop]

    expected = jax.make_array_from_callback((B, L), NamedSharding(mesh(2, 1, 1, 1), SPEC), piece)
    np.testing.assert_array_equal(expected[4:], local)


def test_closing_midway_and_dropping(mesh):
    sharding = NamedSharding(mesh(1, 1, 1, 1), SPEC)
    feed = Feed(Counting(delay=0.01), sharding, B)
    next(feed)
    feed.close()
    feed.close()
    with pytest.raises(StopIteration):
        next(feed)
    assert feed_threads() == []

    dropped = Feed(Counting(), sharding, B)
    next(dropped)
    del dropped
    gc.collect()
    for thread in feed_threads():
        thread.join(5)

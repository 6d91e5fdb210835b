"""From a random-access dataset to batches on the devices, loaded a few steps ahead.

The batch of step s is ``dataset[s]``: there is no iterator state to save, and the data order depends neither
on the number of processes nor on the mesh. Each process loads the rows its own devices hold.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

POLL = 0.1  # seconds between looks at whether the feed was closed


@runtime_checkable
class Dataset(Protocol):
    """``dataset[step]``: this process's rows of the batch of a step, arrays [rows, ...] by name; or n rows in
    place of each, with the same n in every process."""

    def __getitem__(self, step: int) -> dict[str, np.ndarray]: ...


class DataError(RuntimeError):
    """A batch could not be loaded; the cause is chained."""


def local_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """The rows of a global batch that this process must load, as the smallest covering slice.

    Processes own overlapping rows where ``tensor`` or ``sequence`` spans processes.

    Raises:
        ValueError: the sharding does not divide ``batch_size``.
    """
    first = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
    indices = first.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def global_batch(
    batch: dict[str, np.ndarray], sharding: NamedSharding, batch_size: int, rows: slice
) -> dict[str, jax.Array]:
    """Device arrays [B, ...] from the ``rows`` of each that this process loaded.

    Args:
        batch: arrays [rows, ...] by name.
        sharding: of an array [B, L]; arrays of another rank take the leading part of its spec.
        batch_size: B.
        rows: as from :func:`local_rows`.

    Raises:
        ValueError: an array has another number of rows, or its shape cannot be sharded; names the array.
    """
    return {
        name: _global_array(name, np.asarray(array), sharding, batch_size, rows)
        for name, array in batch.items()
    }


def _global_array(
    name: str, local: np.ndarray, sharding: NamedSharding, batch_size: int, rows: slice
) -> jax.Array:
    count = rows.stop - rows.start
    if local.ndim == 0 or local.shape[0] != count:
        raise ValueError(
            f"{name} has shape {local.shape}, expected {count} rows: rows [{rows.start}, {rows.stop}) of a "
            f"global batch of {batch_size}"
        )
    shape = (batch_size, *local.shape[1:])
    fitted = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: local.ndim]))

    def piece(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return local[(slice(start - rows.start, stop - rows.start), *index[1:])]

    try:
        fitted.shard_shape(shape)
    except ValueError as error:
        raise ValueError(f"{name} of global shape {shape} cannot be sharded: {error}") from error
    return jax.make_array_from_callback(shape, fitted, piece)


class Feed(Iterator[tuple[int, dict[str, jax.Array]]]):
    """Iterates over ``(step, batch)`` from ``start_step`` on; use it as a context, or ``close`` it.

    A background thread stays at most ``prefetch`` batches ahead. An error in the dataset is raised in its
    turn, after the good batches before it, as :class:`DataError` naming the step.
    """

    def __init__(
        self,
        dataset: Dataset,
        sharding: NamedSharding,
        batch_size: int,
        *,
        start_step: int = 0,
        end_step: int | None = None,
        prefetch: int = 2,
    ):
        """
        Args:
            dataset: gives rows ``local_rows(sharding, batch_size)`` of every batch.
            sharding: of an array [B, L].
            batch_size: B, of the global batch.
            start_step, end_step: first step, and the one to stop before (None: never).
            prefetch: batches to load ahead; 0 loads each when asked for, without a thread.
        """
        if prefetch < 0:
            raise ValueError(f"prefetch is {prefetch}, but must be at least 0")
        self._source = _Source(dataset, sharding, batch_size, local_rows(sharding, batch_size))
        self._step = start_step
        self._end = end_step
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if prefetch:
            self._queue: queue.Queue = queue.Queue(prefetch)
            # The thread knows nothing of the Feed itself, so that one merely dropped is collected, and stops.
            arguments = (self._source, start_step, end_step, self._queue, self._stop)
            self._thread = threading.Thread(target=_work, args=arguments, name="feed", daemon=True)
            weakref.finalize(self, self._stop.set)
            self._thread.start()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __next__(self) -> tuple[int, dict[str, jax.Array]]:
        if self._stop.is_set() or self._step == self._end:
            self.close()
            raise StopIteration
        step, batch = self._step, self._queue.get() if self._thread else self._source.try_load(self._step)
        if isinstance(batch, DataError):
            self.close()
            raise batch
        self._step += 1
        return step, batch

    def close(self) -> None:
        """Stops and joins the thread; batches loaded ahead are dropped. Harmless when repeated."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class _Source:
    """Loads one step's batch onto the devices."""

    def __init__(self, dataset: Dataset, sharding: NamedSharding, batch_size: int, rows: slice):
        self.dataset, self.sharding, self.batch_size, self.rows = dataset, sharding, batch_size, rows

    def try_load(self, step: int) -> dict[str, jax.Array] | DataError:
        try:
            batch, rows = self.dataset[step], self.rows
            # With length buckets rows may be shorter, and as many times more.
            loaded = min((len(array) for array in batch.values()), default=0)
            times = max(loaded // (rows.stop - rows.start), 1)
            rows = slice(rows.start * times, rows.stop * times)
            return global_batch(batch, self.sharding, self.batch_size * times, rows)
        except Exception as cause:
            error = DataError(
                f"the batch of step {step} could not be loaded: {type(cause).__name__}: {cause}"
            )
            error.__cause__ = cause
            return error


def _work(source: _Source, start: int, end: int | None, out: queue.Queue, stop: threading.Event) -> None:
    step = start
    while step != end and not stop.is_set():
        item: Any = source.try_load(step)
        while not stop.is_set():
            try:
                out.put(item, timeout=POLL)
                break
            except queue.Full:
                continue
        if isinstance(item, DataError):
            return
        step += 1

"""One process per peer: no thread pools are shared, and a peer that dies does not end the comparison."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import jax
import numpy as np

from benchmarks.peers import PEERS
from benchmarks.timing import Stopwatch
from benchmarks.workload import Shape, random_tokens
from runtime.host import TUNABLES

T = TypeVar("T")


class PeerFailed(RuntimeError):
    """The peer raised, or its process died; the message says which and how."""


class Process:
    """A process of its own for one peer, idle between calls. Use as a context manager."""

    def __init__(self, name: str, tuned_malloc: bool, platforms: str | None = "cpu"):
        """``name`` is that of the peer, for messages; ``tuned_malloc`` as in ``benchmarks.peers.Entry``;
        ``platforms`` those jax may use, None for what is there."""
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context)
        try:
            with _malloc(tuned_malloc):  # the first call starts the process
                self.call(_prepare, platforms)
        except PeerFailed:
            self._pool.shutdown()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def peak_bytes(self) -> int:
        """The most memory the process has held so far."""
        return self.call(_peak_bytes)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``, run in the process.

        Raises:
            PeerFailed: it raised, or the process died.
        """
        try:
            return self._pool.submit(function, *args).result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise PeerFailed(f"{self.name}: its process died, perhaps for want of memory") from error
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            raise PeerFailed(f"{self.name}: {type(error).__name__}: {first_line}") from error


class Worker(Process):
    """A peer of ``benchmarks.lm`` at work."""

    def __init__(self, name: str, shape: Shape):
        """
        Raises:
            PeerFailed: the peer cannot be built.
        """
        super().__init__(name, PEERS[name].tuned_malloc)
        try:
            self.call(_build, name, shape)
        except PeerFailed:
            self._pool.shutdown()
            raise

    def logits(self, length: int) -> np.ndarray:
        """[B, L, V] on the shared random tokens."""
        return self.call(_logits, length)

    def start(self, what: str, length: int) -> float | None:
        """Prepare the work ``what`` (a method of the peer) on ``length`` tokens, and warm it up.

        Returns:
            Seconds of the first call, compilation included; None if the peer has no such method.
        """
        return self.call(_start, what, length)

    def sample(self, what: str, length: int) -> float:
        """Seconds per call of work that was started."""
        return self.call(_sample, what, length)

    def forget(self) -> None:
        """Free what was started."""
        self.call(_forget)

    def ask(self, method: str) -> Any:
        """What a method of the peer without arguments returns."""
        return self.call(_ask, method)


@contextlib.contextmanager
def _malloc(tuned: bool) -> Iterator[None]:
    """Processes started meanwhile have glibc's malloc tuned, or as it is."""
    before = os.environ.pop("GLIBC_TUNABLES", None)
    if tuned and sys.platform == "linux":
        os.environ["GLIBC_TUNABLES"] = TUNABLES
    try:
        yield
    finally:
        os.environ.pop("GLIBC_TUNABLES", None)
        if before is not None:
            os.environ["GLIBC_TUNABLES"] = before


# What runs in the worker process.
_held: dict[str, Any] = {}
_watches: dict[tuple[str, int], Stopwatch] = {}


def _prepare(platforms: str | None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A GPU may be shared with torch, in a process beside this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if platforms is not None:
        jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported


def _build(name: str, shape: Shape) -> None:
    _held.update(peer=PEERS[name].load()(shape), shape=shape)


def _logits(length: int) -> np.ndarray:
    return _held["peer"].logits(random_tokens(_held["shape"], length))


def _start(what: str, length: int) -> float | None:
    make = getattr(_held["peer"], what, None)
    if make is None:
        return None
    tokens = random_tokens(_held["shape"], length + 1)
    watch = Stopwatch(make(tokens if what == "train" else tokens[:, :-1]))
    _watches[what, length] = watch
    return watch.warm_up()


def _sample(what: str, length: int) -> float:
    return _watches[what, length].sample()


def _forget() -> None:
    _watches.clear()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _ask(method: str) -> Any:
    return getattr(_held["peer"], method)()

"""What runs in the process of a framework: a call is started, sampled and forgotten."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ops.cases import FORWARD, Case, step
from benchmarks.ops.peers import PEERS, TORCH
from benchmarks.timing import Stopwatch

SAMPLE_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Started:
    """A call that has been made once.

    Attributes:
        compile_seconds: None where compilation is part of the first call.
        bytes: that the compiler expects to be moved, None if it does not say.
        y: the first output, float32.
    """

    compile_seconds: float | None
    first_seconds: float
    bytes: float | None
    y: np.ndarray

    def differs_from(self, other: Started) -> float:
        """Largest difference of y over the largest of the other's."""
        return float(np.abs(self.y - other.y).max() / np.abs(other.y).max())


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds a call, of the clock and of all cores together."""

    wall: float
    cpu: float


_watches: dict[tuple[str, str, str], Stopwatch] = {}


def device() -> tuple[str, str]:
    """Platform ("cpu", "tpu", "cuda") and kind of the first device."""
    first = jax.devices()[0]
    return first.platform.replace("gpu", "cuda"), first.device_kind


def start(case: Case, who: str, what: str) -> Started:
    """Compile the call and make it; ``who`` is an implementation of the op or a peer."""
    peer = PEERS.get(case.op, {}).get(who)
    if peer is not None and peer.framework == TORCH:
        call, compile_seconds, moved = _torch(case, peer.load(), what), None, None
    else:
        function = (
            (lambda arrays: case.call(arrays, who))
            if peer is None
            else (lambda arrays: peer.load()(arrays, dict(case.shape)))
        )
        call, compile_seconds, moved = _jax(case, function, what)
    watch = Stopwatch(call, SAMPLE_SECONDS)
    first = watch.warm_up()
    _watches[str(case), who, what] = watch
    return Started(compile_seconds, first, moved, _first_output(call()))


def sample(case: Case, who: str, what: str) -> Sample:
    """One sample of a call that was started."""
    clock, busy = time.perf_counter(), time.process_time()
    wall = _watches[str(case), who, what].sample()
    cores = (time.process_time() - busy) / (time.perf_counter() - clock)
    return Sample(wall, wall * cores)


def forget() -> None:
    """Free what was started."""
    _watches.clear()


def _jax(case: Case, function: Callable, what: str) -> tuple[Callable[[], Any], float, float | None]:
    arrays = jax.tree.map(jnp.asarray, case.arrays())
    begin = time.perf_counter()
    compiled = jax.jit(step(function, what)).lower(arrays).compile()
    seconds = time.perf_counter() - begin
    moved = (compiled.cost_analysis() or {}).get("bytes accessed")
    return lambda: compiled(arrays), seconds, moved


def _torch(case: Case, function: Callable, what: str) -> Callable[[], Any]:
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for name, array in case.arrays().items():
        wide = array.astype(np.complex64 if np.iscomplexobj(array) else np.float32)
        tensors[name] = torch.tensor(wide, device=place)
        if array.dtype == jnp.bfloat16:
            tensors[name] = tensors[name].to(torch.bfloat16)
        tensors[name].requires_grad_(what != FORWARD)

    def call() -> Any:
        with torch.set_grad_enabled(what != FORWARD):
            y = function(tensors, dict(case.shape))
        if what != FORWARD:
            torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))
        if place == "cuda":
            torch.cuda.synchronize()
        return y.detach()

    return call


def _first_output(out: Any) -> np.ndarray:
    first = jax.tree.leaves(out)[0]
    if hasattr(first, "cpu"):  # torch
        first = first.float().cpu().numpy()
    return np.asarray(first).astype(np.complex64 if np.iscomplexobj(first) else np.float32)

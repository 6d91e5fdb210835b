"""What a longer context costs: time of reading it, time of one more token after it, bytes carried."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from eval.decode import PIECE
from eval.opened import OpenRun
from eval.probes.inside import reach, trained_length
from eval.probes.plot import plot_curves
from eval.probes.types import Curve, NotApplicable, ProbeResult, Say
from models.functional import Functional
from models.lm import LM

LENGTH = "tokens of context"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Prefill, decoding and memory against the length of the context, on random tokens.

    * prefill: tokens a second, of ``batch`` rows read from an empty state in pieces of at most 1024 tokens,
      the median of ``repeats``;
    * decode: milliseconds of one token a row, greedy, one call of the program a token: the median and the
      90th percentile of ``steps`` after ``warmup``, with the state already filled;
    * ``state_bytes``: what is carried, exactly; parameters are not in it;
    * ``*_temporary_bytes``: what the compiled program takes beside its arguments and results, by XLA's count.

    Compilation is told apart (``compile_seconds``). ``slope`` is that of the logarithm of each over that of
    the length: 1 is proportional, 0 constant. On a CPU only these are worth comparing. A small model is as
    slow as the calls of its program.
    """

    name: ClassVar[str] = "speed"
    factors: tuple[float, ...] = (1.0, 4.0, 16.0)
    batch: int = 1
    steps: int = 64
    warmup: int = 8
    repeats: int = 3

    def __post_init__(self) -> None:
        if min(self.batch, self.steps, self.repeats) < 1 or self.warmup < 0:
            raise ValueError(f"{self.name}: batch, steps and repeats should be at least 1, got {self}")
        if not self.factors or min(self.factors) <= 0:
            raise ValueError(f"{self.name}.factors={self.factors} should be positive, and at least one")

    def run(self, opened: OpenRun, say: Say) -> ProbeResult:
        if not isinstance(opened.model.bind(opened.model.shapes), LM):
            raise NotApplicable(f"nothing is decoded in a run of kind {opened.config.kind!r}")
        trained, after = trained_length(opened), self.warmup + self.steps
        lengths, left_out = {}, {}
        for factor in sorted(self.factors):
            length = round(factor * trained)
            length -= length % min(max(length, 1), PIECE)
            if not 0 < length <= reach(opened, length + after) - after:
                left_out[f"{factor:g}x"] = (
                    f"{length} tokens and {after} more, of {opened.config.model.longest}"
                )
            else:
                lengths[f"{factor:g}x"] = length
        if not lengths:
            raise NotApplicable(f"the model has no positions for any length: {left_out}")
        measured: dict[str, dict[str, float]] = {}
        for name, length in lengths.items():
            say(f"{name}: {self.batch} x {length} tokens")
            for key, value in self._measure(opened, length).items():
                measured.setdefault(key, {})[name] = value
        numbers: dict[str, Any] = {
            "training_length": trained,
            "batch": self.batch,
            "lengths": lengths,
            "left_out": left_out,
            **measured,
            "slope": _slopes(lengths, measured),
        }
        peaks = [
            (device.memory_stats() or {}).get("peak_bytes_in_use") for device in opened.mesh.devices.flat
        ]
        if known := [peak for peak in peaks if peak is not None]:
            numbers["device_peak_bytes"] = max(known)
        return ProbeResult(numbers, _curves(numbers))

    def plot(self, result: ProbeResult) -> Figure:
        labels = [curve.ylabel for curve in result.curves.values()]
        return plot_curves(result.curves, "Cost of context", logarithmic=labels)

    def _measure(self, opened: OpenRun, length: int) -> dict[str, float]:
        programs, found = _programs(opened.model), {}
        room, piece = length + self.warmup + self.steps, min(length, PIECE)
        rng = np.random.default_rng(0)
        ids = rng.integers(opened.config.model.vocab_size, size=(self.batch, length), dtype=np.int32)
        state = programs["start"](opened.params, self.batch, room)
        begin = time.perf_counter()
        read = programs["step"].lower(opened.params, ids[:, :piece], state).compile()
        decode = programs["step"].lower(opened.params, ids[:, :1], state).compile()
        found["compile_seconds"] = time.perf_counter() - begin

        times = []
        for _ in range(1 + self.repeats):
            state = jax.block_until_ready(programs["start"](opened.params, self.batch, room))
            begin = time.perf_counter()
            for first in range(0, length, piece):
                token, state = read(opened.params, ids[:, first : first + piece], state)
            token.block_until_ready()
            times.append(time.perf_counter() - begin)
        found["prefill_seconds"] = float(np.median(times[1:]))
        found["prefill_tokens_per_second"] = self.batch * length / found["prefill_seconds"]

        times = []
        for _ in range(self.warmup + self.steps):
            begin = time.perf_counter()
            token, state = decode(opened.params, token, state)
            token.block_until_ready()
            times.append(1e3 * (time.perf_counter() - begin))
        found["decode_ms_median"] = float(np.median(times[self.warmup :]))
        found["decode_ms_p90"] = float(np.quantile(times[self.warmup :], 0.9))
        found["state_bytes"] = state_bytes(opened.model, self.batch, length)
        for name, compiled in (("prefill", read), ("decode", decode)):
            if (memory := compiled.memory_analysis()) is not None:
                found[f"{name}_temporary_bytes"] = memory.temp_size_in_bytes
        return found


def state_bytes(model: Functional, batch: int, length: int) -> int:
    """Bytes that the model carries after ``length`` tokens of ``batch`` rows."""
    state = jax.eval_shape(lambda params: model.bind(params).init_state(batch, length), model.shapes)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@functools.lru_cache(maxsize=1)
def _programs(model: Functional) -> dict[str, Any]:
    """ "start": the state before any token; "step": the likeliest next token [B, 1] and the state after."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def start(params: Any, rows: int, room: int) -> Any:
        return model.bind(params).init_state(rows, room)

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params: Any, tokens: Array, state: Any) -> tuple[Array, Any]:
        lm = model.bind(params)
        hidden, state, _ = lm(tokens, state)
        return jnp.argmax(lm.logits(hidden[:, -1:]), axis=-1).astype(jnp.int32), state

    return {"start": start, "step": step}


def _slopes(lengths: Mapping[str, int], measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of the logarithms over that of the length, from two lengths on."""
    if len(lengths) < 2:
        return {}
    x = np.log(list(lengths.values()))
    keys = ("prefill_seconds", "decode_ms_median", "state_bytes")
    return {key: float(np.polyfit(x, np.log(list(measured[key].values())), 1)[0]) for key in keys}


def _curves(numbers: Mapping[str, Any]) -> dict[str, Curve]:
    x = list(numbers["lengths"].values())
    labels = {
        "prefill_tokens_per_second": ("prefill", "tokens a second"),
        "decode_ms_median": ("decode, median", "ms a token"),
        "decode_ms_p90": ("decode, 90th percentile", "ms a token"),
        "state_bytes": ("state", "bytes"),
        "prefill_temporary_bytes": ("temporaries of a piece of prefill", "bytes"),
        "decode_temporary_bytes": ("temporaries of a decoding step", "bytes"),
    }
    return {
        name: Curve(x, list(numbers[key].values()), LENGTH, label)
        for key, (name, label) in labels.items()
        if key in numbers
    }

"""Who is compared, what each needs installed, and what a peer can be asked to do."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

from jaxtyping import Float, Int
from numpy import ndarray

from benchmarks.workload import Shape

DECODE_STEPS = 64  # tokens of one timed decoding call


class Peer(Protocol):
    """A language model with the weights of ``workload.published_weights(shape)``, float32, on the CPU.

    Each method but the first gives a call to be timed, which returns arrays or waits for its result.
    """

    def __init__(self, shape: Shape): ...

    def logits(self, tokens: Int[ndarray, "B L"]) -> Float[ndarray, "B L V"]:
        """Of every position, on no state."""

    def train(self, tokens: Int[ndarray, "B L+1"]) -> Callable[[], Any]:
        """One step: mean cross entropy of every next token, its gradient, one AdamW update."""

    def prefill(self, tokens: Int[ndarray, "B L"]) -> Callable[[], Any]:
        """Logits of the last token and the state after it."""

    def decode(self, tokens: Int[ndarray, "B L"]) -> Callable[[], Any]:
        """``DECODE_STEPS`` further tokens, each the most likely one, after the context ``tokens``."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a peer is found: ``module:class``, the packages it imports, and what the reader is told.

    ``tuned_malloc`` says whether its process has the settings of ``runtime/host.py`` or glibc's own.
    """

    where: str
    packages: tuple[str, ...]
    about: str
    tuned_malloc: bool = False

    def load(self) -> type[Peer]:
        """Its class, imported now."""
        module, name = self.where.split(":")
        return getattr(importlib.import_module(module), name)

    def missing(self) -> str | None:
        """Which package is not installed and the command that installs it, or None."""
        absent = [p for p in self.packages if importlib.util.find_spec(p.replace("-", "_")) is None]
        if not absent:
            return None
        return f"{' and '.join(absent)} not installed: pip install -e '.[bench]'"


_AS_USED: dict[str, Entry] = {
    "longspan": Entry(
        "benchmarks.jax_peers:Longspan", (), "this repository, its own train step", tuned_malloc=True
    ),
    "transformers": Entry(
        "benchmarks.torch_peers:Transformers",
        ("torch", "transformers"),
        "Mamba2ForCausalLM as it runs on CPU: its torch path, one call a token",
    ),
    "torch-ssd": Entry(
        "benchmarks.torch_peers:PlainTorch", ("torch",), "a plain torch chunked SSD (benchmarks/torch_ssd.py)"
    ),
    "mamba2-jax": Entry("benchmarks.jax_peers:Mamba2Jax", ("mamba2-jax",), "the PyPI package, jitted here"),
}
OURS = "longspan"


def _other_malloc(name: str, entry: Entry) -> tuple[str, Entry]:
    tuned = not entry.tuned_malloc
    about = "with the malloc of runtime/host.py" if tuned else "with glibc's own malloc"
    changed = dataclasses.replace(entry, about=about, tuned_malloc=tuned)
    return f"{name}:{'tuned' if tuned else 'plain'}-malloc", changed


# Everyone as their users run them (our programs tune malloc for themselves, nobody else's do), then everyone
# with the other malloc, so that both comparisons stand in one run.
PEERS: dict[str, Entry] = _AS_USED | dict(_other_malloc(*item) for item in _AS_USED.items())

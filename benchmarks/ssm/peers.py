"""Who is compared, which layers each has, and where its code is found."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from benchmarks.ssm.workload import Shape


class Peer(Protocol):
    """One layer with the parameters of ``workload.build(kind, shape)``, float32, on the CPU."""

    def __init__(self, kind: str, shape: Shape, sources: pathlib.Path | None): ...

    def check(self) -> dict[str, np.ndarray]:
        """ "output" and "input gradient", both [B, L, D], of ``workload.inputs(shape)``."""

    def step(self) -> Callable[[], Any]:
        """A call to be timed: forward, and backward to every parameter and to the input."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A repository that is no package, looked for in a folder of that name below ``--sources``."""

    repository: str
    commit: str

    @property
    def folder(self) -> str:
        """That it is cloned into."""
        return self.repository.partition("/")[2]

    def found(self, sources: pathlib.Path | None) -> bool:
        """Whether it is there."""
        return sources is not None and (sources / self.folder).is_dir()

    def how(self) -> str:
        """Why it is missing, and the command that gets it."""
        return (
            f"no folder {self.folder} in --sources: git clone https://github.com/{self.repository} there, "
            f"and git checkout {self.commit[:12]}"
        )


S4_SOURCE = Source("state-spaces/s4", "e757cef57d89e448c413de7325ed5601aceaac13")
DSS_SOURCE = Source("ag1988/dss", "777084e777c27caba2e87eceecb3f49d1b761cd8")
S5_SOURCE = Source("lindermanlab/S5", "3c18fdb6b06414da35e77b94b9cd855f6a95ef17")
ANNOTATED_SOURCE = Source("srush/annotated-s4", "f19e2464990f0c07943bb922894d6f2af65c9bd9")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A peer: ``module:class``, its layers, its code and packages, and what the reader is told.

    ``tuned_malloc`` says whether its process has the settings of ``runtime/host.py`` or glibc's own;
    ``longest`` is the most tokens it is asked for.
    """

    where: str
    kinds: tuple[str, ...]
    about: str
    source: Source | None = None
    packages: tuple[str, ...] = ()
    tuned_malloc: bool = False
    longest: int | None = None

    def load(self) -> type[Peer]:
        """Its class, imported now."""
        module, name = self.where.split(":")
        return getattr(importlib.import_module(module), name)

    def missing(self, sources: pathlib.Path | None, shape: Shape) -> str | None:
        """Why it does not take part, and what to do about it; None if it does."""
        if self.longest is not None and shape.length > self.longest:
            return f"not run beyond {self.longest} tokens, where a step takes minutes"
        if self.source is not None and not self.source.found(sources):
            return self.source.how()
        absent = [p for p in self.packages if importlib.util.find_spec(p) is None]
        return f"{' and '.join(absent)} not installed: pip install {' '.join(absent)}" if absent else None


OURS = "longspan"
TORCH = ("torch", "einops", "scipy")
PEERS: dict[str, Entry] = {
    OURS: Entry(
        "benchmarks.ssm.jax_peers:Longspan",
        ("s4", "s4d", "dss", "s5", "mamba"),
        "this repository",
        tuned_malloc=True,
    ),
    "state-spaces/s4": Entry(
        "benchmarks.ssm.torch_peers:S4Block",
        ("s4", "s4d"),
        "the authors' S4Block in torch, modes dplr and diag, without CUDA extension or pykeops",
        S4_SOURCE,
        TORCH,
    ),
    "ag1988/dss": Entry(
        "benchmarks.ssm.torch_peers:DSS",
        ("dss",),
        "the authors' DSS in torch",
        DSS_SOURCE,
        (*TORCH, "opt_einsum"),
    ),
    "lindermanlab/S5": Entry(
        "benchmarks.ssm.jax_peers:S5", ("s5",), "the authors' S5SSM in JAX, jitted, with its gate", S5_SOURCE
    ),
    "annotated-s4": Entry(
        "benchmarks.ssm.jax_peers:Annotated",
        ("s4", "s4d", "dss"),
        "its layers in JAX, jitted, with the output layer of the others",
        ANNOTATED_SOURCE,
    ),
    "transformers": Entry(
        "benchmarks.ssm.torch_peers:TransformersMamba",
        ("mamba",),
        "MambaMixer as it runs on CPU: token by token",
        packages=("torch", "transformers"),
        longest=1024,
    ),
}


def other_malloc(entry: Entry) -> tuple[str, Entry]:
    """A suffix for its name, and the same peer with the other malloc."""
    tuned = not entry.tuned_malloc
    return f":{'tuned' if tuned else 'plain'}-malloc", dataclasses.replace(entry, tuned_malloc=tuned)

"""Published tensors and our parameters: one table of names, read in both directions.

Tensors of projections are [out, in] as torch keeps them, unless a format says otherwise, and several
parameters in one are beside each other in the order of the table.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from models import pattern as patterns
from models.beacon import BeaconLM
from models.beacon_config import BeaconLMConfig
from models.config import LMConfig
from models.functional import Functional, Tree
from models.hmt import HMT
from models.hmt_config import HMTConfig
from models.lm import LM
from models.published.blocks import Path, Source, Tensor, repeat_of, sources, stack

Table = Mapping[str, tuple[str, ...]]
Shapes = Mapping[Path, tuple[int, ...]]

VOCABULARY = (("embed", "table"), ("head", "kernel"))
SINGLE = (("beacon_embed",), ("memory", "topic"), ("memory", "prompt"))  # [1, D] as published
MODELS: dict[type[LMConfig], type[LM]] = {LMConfig: LM, HMTConfig: HMT, BeaconLMConfig: BeaconLM}
SUGGESTED = 20  # missing tensors that get a nearest name: comparing all with all takes minutes


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of a checkpoint format; the right-hand sides are the parameters in order of rows.

    Attributes:
        top: what exists once: published name to dotted parameters of the model.
        sublayers: per symbol of the pattern: published name, "{}" for the layer, to dotted parameters of the
            sub-layer. Names of parameters that a config does not have, such as biases, stand for nothing.
        layer: symbols that may stand at each place of a published layer; ("M*", "-") is a mixer, then an MLP.
        embedding, head: names in ``top``; a file may repeat the embedding as the head where they are tied.
        renamed: regular expressions of other names, to the names used here.
        ignored: glob patterns of tensors that are no parameters, such as masks.
        inputs_first: projections of sub-layers are [in, out].
        skipped: name to the number of first rows that no parameter corresponds to.
        padded_vocabulary: whether rows that only pad the vocabulary are part of the format.
    """

    top: Table
    sublayers: Mapping[str, Table]
    layer: tuple[str, ...]
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    inputs_first: bool = False
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    padded_vocabulary: bool = False

    def rename(self, name: str) -> str:
        """The name used here of a tensor of a file."""
        for pattern, new in self.renamed.items():
            name, found = re.subn(pattern, new, name, count=1)
            if found:
                break
        return name

    def ignores(self, name: str) -> bool:
        """Whether a file may hold ``name`` without anyone reading it."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)


def expected_tensors(config: LMConfig, names: Names) -> list[Tensor]:
    """Every tensor of a published checkpoint of ``config``.

    Raises:
        ValueError: the pattern or a parameter has no place in this format.
    """
    return tensors(config, names, parameter_shapes(config))


def sources_from(
    config: LMConfig, expected: Iterable[Tensor], names: Names, found: Mapping[str, Sequence[int]]
) -> dict[Path, Source]:
    """The source of every parameter in a file of tensors of these shapes.

    Raises:
        ValueError: lists by name the tensors that are missing, unexpected, or of another shape.
    """
    placed = _match(config, expected, names, found)
    cut = ((name, tensor.first_rows(found[name][0])) for name, tensor in placed)
    return sources(cut, parameter_shapes(config))


def params_from_tensors(
    config: LMConfig, expected: Iterable[Tensor], names: Names, weights: Mapping[str, Any], dtype: Any
) -> Tree:
    """Nested dict of parameters (numpy) from published tensors.

    Rows of a padded vocabulary that the file does not have are zeros.

    Raises:
        ValueError: lists by name the tensors that are missing, unexpected, or of another shape, or a head
            that differs from the embedding it is tied to.
    """
    weights = {name: np.asarray(value) for name, value in weights.items()}
    made = sources_from(config, expected, names, {name: value.shape for name, value in weights.items()})
    check_tied(config, names, weights)
    flat = {
        path: source.read(lambda name, box: weights[name][box], dtype=dtype) for path, source in made.items()
    }
    return nnx.traversals.unflatten_mapping(flat)


def weights_from_tensors(exported: Iterable[Tensor], params: Tree) -> dict[str, np.ndarray]:
    """Published tensors from a nested dict of parameters: the inverse of :func:`params_from_tensors`."""
    flat = nnx.traversals.flatten_mapping(params)
    return {t.name: t.values(lambda path, box: np.asarray(flat[path])[box]) for t in exported}


def exported_tensors(expected: Iterable[Tensor], names: Names) -> list[Tensor]:
    """The tensors of a file that is written; rows that pad the vocabulary only if the format has them."""
    if names.padded_vocabulary:
        return list(expected)
    return [tensor.first_rows(tensor.least_rows) for tensor in expected]


def tied_head(config: LMConfig, names: Names, found: Iterable[str]) -> tuple[str, str] | None:
    """Names in the file of a head and of the embedding it is tied to and must equal; None without both."""
    given = {names.rename(name): name for name in found}
    if not config.tie_embeddings or not {names.head, names.embedding} <= set(given):
        return None
    return given[names.head], given[names.embedding]


def check_tied(config: LMConfig, names: Names, weights: Mapping[str, Any]) -> None:
    """Raises ValueError if the file has a head that differs from the embedding it is tied to."""
    tied = tied_head(config, names, weights)
    if tied is not None and not np.array_equal(weights[tied[0]], weights[tied[1]]):
        raise ValueError(
            f"checkpoint does not fit the model:\n  {tied[0]} differs from {tied[1]}, to which it is tied"
        )


def tensors(config: LMConfig, names: Names, shapes: Shapes) -> list[Tensor]:
    """Every tensor of a published checkpoint of ``config``, for parameters of ``shapes``.

    Raises:
        ValueError: the pattern or a parameter has no place in this format.
    """
    rows: list[tuple[str, Path, int | None, tuple[str, ...]]]
    rows = [(name, (), None, table) for name, table in names.top.items()]
    size = len(names.layer)
    if len(config.layers) % size or any(s not in names.layer[i % size] for i, s in enumerate(config.layers)):
        expected = "".join(f"[{symbols}]" for symbols in names.layer)
        raise ValueError(
            f"model.pattern={config.pattern!r}: the checkpoint format has layers {expected} only"
        )
    for i, (symbol, (prefix, index)) in enumerate(zip(config.layers, slots(config))):
        for name, table in names.sublayers[symbol].items():
            rows.append((name.format(i // size), prefix, index, table))

    found, unnamed = [], set(shapes)
    for name, prefix, index, table in rows:
        paths = [path for ours in table if (path := (*prefix, *ours.split("."))) in shapes]
        if paths:
            found.append(_describe(name, paths, index, shapes, names, config))
            unnamed -= set(paths)
    if unnamed:
        listed = ", ".join(sorted(".".join(map(str, path)) for path in unnamed))
        raise ValueError(f"the checkpoint format has no names for these parameters: {listed}")
    return found


def slots(config: LMConfig) -> list[tuple[Path, int | None]]:
    """Where the parameters of each sub-layer are: path, and which of the stacked repeats, or None."""
    found: list[tuple[Path, int | None]] = []
    for run, (unit, repeats) in enumerate(patterns.runs(config.layers)):
        for repeat in range(repeats):
            index = repeat if repeats > 1 else None
            found += [(("backbone", "runs", run, "layers", i), index) for i in range(len(unit))]
    return found


def parameter_shapes(config: LMConfig) -> dict[Path, tuple[int, ...]]:
    """Shape of every parameter of the model of ``config``."""
    shapes = Functional.create(lambda rngs: MODELS[type(config)](config, rngs=rngs)).shapes
    return {path: leaf.shape for path, leaf in nnx.traversals.flatten_mapping(shapes).items()}


def _describe(
    name: str, paths: Sequence[Path], index: int | None, shapes: Shapes, names: Names, config: LMConfig
) -> Tensor:
    """A tensor of the parameters ``paths``, of one of their repeats."""
    inputs_first = names.inputs_first and paths[0][0] == "backbone"
    axes = _axes(paths[0], len(shapes[paths[0]]) - (index is not None), inputs_first)
    outputs = 1 if inputs_first and len(axes) == 2 and paths[0][-1] == "kernel" else 0
    blocks = [repeat_of(path, shapes[path], index, axes) for path in paths]
    tensor = stack(name, blocks, outputs, names.skipped.get(name, 0))
    return dataclasses.replace(tensor, least_rows=config.vocab_size) if paths[0] in VOCABULARY else tensor


def _axes(path: Path, rank: int, inputs_first: bool) -> tuple[int | None, ...]:
    """For every axis of a published tensor, that of the parameter ``path`` without the stack."""
    if path[-1] == "kernel":
        return (0, 1) if inputs_first else (1, 0)
    if path[-1] == "weight":  # depthwise convolution: torch keeps [C, 1, K], we [K, C]
        return (1, None, 0)
    if path in SINGLE:
        return (None, 0)
    return tuple(range(rank))


def _match(
    config: LMConfig, expected: Iterable[Tensor], names: Names, found: Mapping[str, Sequence[int]]
) -> list[tuple[str, Tensor]]:
    """The expected tensors under their names in the file. Raises ValueError naming all that does not fit."""
    wanted = {tensor.name: tensor for tensor in expected}
    given = {names.rename(name): name for name in found if not names.ignores(name)}
    twice = {name for name in found if given.get(names.rename(name), name) != name}
    extra = set(given) - set(wanted)
    if config.tie_embeddings:
        extra.discard(names.head)
    missing = [tensor for name, tensor in wanted.items() if name not in given]
    problems = []
    for i, tensor in enumerate(missing):
        nearest = difflib.get_close_matches(tensor.name, extra, 1) if i < SUGGESTED else []
        problems.append(
            f"missing {tensor.name} {tensor.shape}" + "".join(f"; the nearest is {given[n]}" for n in nearest)
        )
    problems += [f"unexpected {name}" for name in sorted({given[n] for n in extra} | twice)]
    placed = [(given[name], tensor) for name, tensor in wanted.items() if name in given]
    problems += [
        f"{name} is {tuple(found[name])}, expected {tensor.shape}"
        for name, tensor in placed
        if not tensor.fits(found[name])
    ]
    if problems:
        raise ValueError("checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return placed

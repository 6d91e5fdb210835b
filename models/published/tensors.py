"""Published tensors and our parameters: one table of names, read in both directions.

A published tensor is one or several parameters stacked along its first axis (``in_proj`` is z, x, B, C and
dt). Repeated layers are apart in a file and stacked on a leading axis here (``models/pattern.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from models import pattern as patterns
from models.config import LMConfig
from models.functional import Functional, Tree
from models.lm import LM

Path = tuple[Any, ...]
Table = Mapping[str, tuple[str, ...]]

VOCABULARY = (("embed", "table"), ("head", "kernel"))


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of a checkpoint format; the right-hand sides are the parameters in order of rows.

    Attributes:
        top: what exists once: published name to dotted parameters of the model.
        sublayers: per symbol of the pattern: published name, "{}" for the layer, to dotted parameters of the
            sub-layer. Names of parameters that a config does not have, such as biases, stand for nothing.
        layer: symbols that may stand at each place of a published layer; ("M*", "-") is a mixer, then an MLP.
        embedding, head: names in ``top``; a file may repeat the embedding as the head where they are tied.
        renamed: other beginnings of names, to the beginnings used here.
        padded_vocabulary: whether rows that only pad the vocabulary are part of the format.
    """

    top: Table
    sublayers: Mapping[str, Table]
    layer: tuple[str, ...]
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    padded_vocabulary: bool = False


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A published tensor.

    Attributes:
        name: its published name.
        parts: path of each parameter in it, and which of the stacked repeats, or None.
        shapes: published shape of each part.
        least_rows: rows that must be there; fewer than all only for the vocabulary.
    """

    name: str
    parts: tuple[tuple[Path, int | None], ...]
    shapes: tuple[tuple[int, ...], ...]
    least_rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def fits(self, shape: Sequence[int]) -> bool:
        rows = shape[0] if shape else 0
        return tuple(shape[1:]) == self.shape[1:] and self.least_rows <= rows <= self.shape[0]


def params_from_weights(
    config: LMConfig, weights: Mapping[str, Any], names: Names, dtype: Any = np.float32
) -> Tree:
    """Nested dict of parameters (numpy) from published tensors, which are read one at a time.

    Rows of a padded vocabulary that the file does not have are zeros.

    Raises:
        ValueError: lists by name the tensors that are missing, unexpected, or of another shape, a head that
            differs from the embedding it is tied to, or what the format has no place for.
    """
    shapes = _shapes(config)
    expected = tensors(config, names, shapes)
    found = {_rename(name, names.renamed): name for name in weights}
    problems = [f"missing {t.name} {t.shape}" for t in expected if t.name not in found]
    extra = set(found) - {t.name for t in expected}
    if config.tie_embeddings and {names.head, names.embedding} <= set(found):
        extra.discard(names.head)
        head, embedding = found[names.head], found[names.embedding]
        if not np.array_equal(np.asarray(weights[head]), np.asarray(weights[embedding])):
            problems.append(f"{head} differs from {embedding}, to which it is tied")
    twice = set(weights) - set(found.values())  # under two of the renamed beginnings
    problems += [f"unexpected {name}" for name in sorted({found[n] for n in extra} | twice)]

    flat = {path: np.zeros(shape, dtype) for path, shape in shapes.items()}
    for tensor in (t for t in expected if t.name in found):
        value = np.asarray(weights[found[tensor.name]])
        if tensor.fits(value.shape):
            _fill(flat, tensor, value)
        else:
            problems.append(f"{found[tensor.name]} is {value.shape}, expected {tensor.shape}")
    if problems:
        raise ValueError("checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return nnx.traversals.unflatten_mapping(flat)


def weights_from_params(config: LMConfig, params: Tree, names: Names) -> dict[str, np.ndarray]:
    """Published tensors from a nested dict of parameters: the inverse of :func:`params_from_weights`.

    Raises:
        ValueError: ``config`` has a pattern or parameters the format has no place for.
    """
    flat = nnx.traversals.flatten_mapping(params)
    weights = {}
    for tensor in tensors(config, names, _shapes(config)):
        parts = [
            _layout(path)[1](np.asarray(flat[path] if index is None else flat[path][index]))
            for path, index in tensor.parts
        ]
        rows = tensor.shape[0] if names.padded_vocabulary else tensor.least_rows
        weights[tensor.name] = np.ascontiguousarray(np.concatenate(parts)[:rows])
    return weights


def tensors(config: LMConfig, names: Names, shapes: Mapping[Path, tuple[int, ...]]) -> list[Tensor]:
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
    for i, (symbol, (prefix, index)) in enumerate(zip(config.layers, _slots(config))):
        for name, table in names.sublayers[symbol].items():
            rows.append((name.format(i // size), prefix, index, table))

    found, unnamed = [], set(shapes)
    for name, prefix, index, table in rows:
        parts = tuple(((*prefix, *ours.split(".")), index) for ours in table)
        if all(path in shapes for path, _ in parts):
            found.append(_describe(name, parts, shapes, config))
            unnamed -= {path for path, _ in parts}
    if unnamed:
        listed = ", ".join(sorted(".".join(map(str, path)) for path in unnamed))
        raise ValueError(f"the checkpoint format has no names for these parameters: {listed}")
    return found


def _describe(name: str, parts: Any, shapes: Mapping[Path, tuple[int, ...]], config: LMConfig) -> Tensor:
    published = []
    for path, index in parts:
        shape = shapes[path] if index is None else shapes[path][1:]
        published.append(_layout(path)[1](np.broadcast_to(0, shape)).shape)
    rows = sum(shape[0] for shape in published)
    return Tensor(name, parts, tuple(published), config.vocab_size if parts[0][0] in VOCABULARY else rows)


def _fill(flat: dict[Path, np.ndarray], tensor: Tensor, value: np.ndarray) -> None:
    if len(value) < tensor.shape[0]:
        value = np.concatenate([value, np.zeros((tensor.shape[0] - len(value), *value.shape[1:]))])
    start = 0
    for (path, index), shape in zip(tensor.parts, tensor.shapes):
        part = _layout(path)[0](value[start : start + shape[0]])
        flat[path][... if index is None else index] = part
        start += shape[0]


def _layout(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """From the published layout of a parameter to ours, and back."""
    if path[-1] == "kernel":  # torch keeps [out, in]
        return np.transpose, np.transpose
    if path[-1] == "weight":  # depthwise convolution: torch keeps [C, 1, K], we [K, C]
        return lambda w: w[:, 0].T, lambda w: w.T[:, None]
    return lambda w: w, lambda w: w


def _slots(config: LMConfig) -> list[tuple[Path, int | None]]:
    """Where the parameters of each sub-layer are: path, and which of the stacked repeats, or None."""
    slots: list[tuple[Path, int | None]] = []
    for run, (unit, repeats) in enumerate(patterns.runs(config.layers)):
        for repeat in range(repeats):
            index = repeat if repeats > 1 else None
            slots += [(("backbone", "runs", run, "layers", i), index) for i in range(len(unit))]
    return slots


def _shapes(config: LMConfig) -> dict[Path, tuple[int, ...]]:
    shapes = Functional.create(lambda rngs: LM(config, rngs=rngs)).shapes
    return {path: leaf.shape for path, leaf in nnx.traversals.flatten_mapping(shapes).items()}


def _rename(name: str, renamed: Mapping[str, str]) -> str:
    for old, new in renamed.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name

"""Boxes of published tensors that are boxes of our parameters, read and written a part at a time.

A published tensor is one or several of our parameters beside each other (``in_proj`` is z, x, B, C and dt),
in a layout of its own (torch keeps projections [out, in]); and what is repeated is apart in a file and
stacked on a leading axis here. All of it is boxes that correspond, with their axes in another order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Path = tuple[Any, ...]
Slices = tuple[slice, ...]
Box = tuple[tuple[int, int], ...]  # first and end along every axis


@dataclasses.dataclass(frozen=True)
class Block:
    """A box of a parameter and the box of a published tensor that holds its values.

    Attributes:
        path: of the parameter.
        ours, theirs: the boxes.
        axes: for every axis of the tensor the axis of the parameter, None for one of length 1. Axes of the
            parameter that are not named have length 1 in its box.
    """

    path: Path
    ours: Box
    theirs: Box
    axes: tuple[int | None, ...]

    def within(self, box: Box) -> Block | None:
        """The part in a box of the parameter; None if there is none."""
        ours = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(self.ours, box))
        if any(first >= end for first, end in ours):
            return None
        return self._moved(ours)

    def rows(self, axis: int, first: int, end: int) -> Block:
        """The part ``first`` to ``end`` of the block along an axis of the tensor."""
        (mine,) = (a for a in self.axes[axis : axis + 1] if a is not None)
        start = self.ours[mine][0]
        ours = (*self.ours[:mine], (start + first, start + end), *self.ours[mine + 1 :])
        return self._moved(ours)

    def at(self, axis: int, first: int) -> Block:
        """The same box of the parameter, ``first`` along an axis of the tensor."""
        size = self.length(axis)
        theirs = (*self.theirs[:axis], (first, first + size), *self.theirs[axis + 1 :])
        return dataclasses.replace(self, theirs=theirs)

    def length(self, axis: int) -> int:
        """Extent along an axis of the tensor."""
        return self.theirs[axis][1] - self.theirs[axis][0]

    def to_ours(self, part: np.ndarray) -> np.ndarray:
        """Values of the box of the tensor, as the box of the parameter has them."""
        order = [axis for axis in self.axes if axis is not None]
        flat = part.reshape([n for n, axis in zip(part.shape, self.axes) if axis is not None])
        return flat.transpose(np.argsort(order)).reshape([end - first for first, end in self.ours])

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_ours`."""
        named = sorted(axis for axis in self.axes if axis is not None)
        flat = part.reshape([part.shape[axis] for axis in named])
        order = [named.index(axis) for axis in self.axes if axis is not None]
        return flat.transpose(order).reshape([end - first for first, end in self.theirs])

    def _moved(self, ours: Box) -> Block:
        """With another box of the parameter, inside this one, and what corresponds to it."""
        theirs = tuple(
            whole
            if axis is None
            else (
                whole[0] + ours[axis][0] - self.ours[axis][0],
                whole[0] + ours[axis][1] - self.ours[axis][0],
            )
            for axis, whole in zip(self.axes, self.theirs)
        )
        return Block(self.path, ours, theirs, self.axes)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A published tensor.

    Attributes:
        name: its published name.
        shape: as published.
        blocks: the parameters in it; what is in none of them is zero.
        least_rows: rows that a file must have; fewer than all only where the rest pads the vocabulary.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    least_rows: int

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a file's tensor of ``shape`` can be this one."""
        rows = shape[0] if shape else 0
        return tuple(shape[1:]) == self.shape[1:] and self.least_rows <= rows <= self.shape[0]

    def first_rows(self, rows: int) -> Tensor:
        """The tensor of a file that has this many rows."""
        if rows == self.shape[0]:
            return self
        box = ((0, rows), *((0, n) for n in self.shape[1:]))
        kept = [
            b.rows(0, 0, min(b.theirs[0][1], rows) - b.theirs[0][0])
            for b in self.blocks
            if b.theirs[0][0] < rows
        ]
        return Tensor(self.name, tuple(end for _, end in box), tuple(kept), min(self.least_rows, rows))

    def values(self, read: Callable[[Path, Slices], Any]) -> np.ndarray:
        """The tensor; ``read(path, box)`` gives the values of a box of a parameter."""
        parts = [np.asarray(read(block.path, slices(block.ours))) for block in self.blocks]
        value = np.zeros(self.shape, parts[0].dtype)
        for block, part in zip(self.blocks, parts):
            value[slices(block.theirs)] = block.to_theirs(part)
        return value


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the values of a parameter are: blocks, each with the name of its tensor in the file.

    What no block covers is zero: rows that only pad the vocabulary.
    """

    shape: tuple[int, ...]
    blocks: tuple[tuple[str, Block], ...]

    @property
    def names(self) -> list[str]:
        """The tensors it is made of, each once."""
        return list(dict.fromkeys(name for name, _ in self.blocks))

    def read(
        self,
        read: Callable[[str, Slices], Any],
        index: Sequence[slice] | None = None,
        dtype: Any = np.float32,
    ) -> np.ndarray:
        """The parameter, or the box ``index`` of it, such as a shard.

        Args:
            read: ``read(name, box)`` gives the values of a box of a published tensor.
            index: a slice (step 1) for every axis of the parameter, as of ``jax.make_array_from_callback``.
            dtype: of the result.
        """
        chosen = index if index is not None else [slice(None)] * len(self.shape)
        ranges = [s.indices(n) for s, n in zip(chosen, self.shape)]
        box = tuple((first, end) for first, end, _ in ranges)
        value = np.zeros([end - first for first, end in box], dtype)
        for name, whole in self.blocks:
            block = whole.within(box)
            if block is not None:
                here = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(block.ours, box))
                value[here] = block.to_ours(np.asarray(read(name, slices(block.theirs))))
        return value


def sources(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[Path, tuple[int, ...]]
) -> dict[Path, Source]:
    """The source of every parameter of ``shapes``, from tensors and the names they have in a file."""
    blocks: dict[Path, list[tuple[str, Block]]] = {path: [] for path in shapes}
    for name, tensor in tensors:
        for block in tensor.blocks:
            blocks[block.path].append((name, block))
    return {path: Source(shapes[path], tuple(parts)) for path, parts in blocks.items()}


def repeat_of(path: Path, shape: Sequence[int], index: int | None, axes: tuple[int | None, ...]) -> Block:
    """One of the stacked repeats of a parameter, or all of one that is not stacked (``index`` None).

    ``axes`` are those of a repeat.
    """
    box = [(0, n) for n in shape]
    if index is not None:  # the stack is the parameter's first axis, and none of the tensor's
        box[0] = (index, index + 1)
        axes = tuple(None if axis is None else axis + 1 for axis in axes)
    sizes = [(0, 1) if axis is None else (0, box[axis][1] - box[axis][0]) for axis in axes]
    return Block(path, tuple(box), tuple(sizes), axes)


def stack(name: str, blocks: Sequence[Block], axis: int, skipped: int = 0) -> Tensor:
    """A tensor of blocks one after another along an axis, after ``skipped`` entries that hold nothing."""
    placed, end = [], skipped
    for block in blocks:
        placed.append(block.at(axis, end))
        end += block.length(axis)
    shape = [block_end for _, block_end in placed[0].theirs]
    shape[axis] = end
    return Tensor(name, tuple(shape), tuple(placed), shape[0])


def split(tensor: Tensor, parts: int, axis: int) -> list[Tensor]:
    """``parts`` tensors along an axis, each with an equal share of every block.

    Raises:
        ValueError: a block does not divide.
    """
    for block in tensor.blocks:
        if block.length(axis) % parts:
            raise ValueError(
                f"{tensor.name}: {block.length(axis)} of {'.'.join(map(str, block.path))} do not divide into "
                f"{parts} parts"
            )
    shares = []
    for i in range(parts):
        sizes = [block.length(axis) // parts for block in tensor.blocks]
        share = [b.rows(axis, i * size, (i + 1) * size) for b, size in zip(tensor.blocks, sizes)]
        shares.append(stack(tensor.name, share, axis))
    return shares


def slices(box: Box) -> Slices:
    """A box as an index."""
    return tuple(slice(first, end) for first, end in box)

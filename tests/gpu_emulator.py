"""GPU kernels run block by block in numpy, to check their arithmetic where there is no GPU.

What a kernel's body is written in (the functions of ``pallas_kernels/mosaic_gpu.py``, ``jnp`` and ``lax``) is
replaced: memory is numpy arrays that start as NaN, layouts mean nothing, copies are made at once. Races and
barriers are not seen here; the simulation of a GPU that comes with Pallas sees them, at many times the cost.
"""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu


class Ref:
    """Memory that is read and written by index, like a Pallas reference."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.at = _At(self)

    def __getitem__(self, index):
        return self.view(index).copy()

    def __setitem__(self, index, value):
        target = self.view(index)
        assert np.shape(value) == target.shape, (np.shape(value), target.shape)
        target[...] = value

    def view(self, index):
        whole = (index if isinstance(index, tuple) else (index,)) if index is not ... else ()
        view = self.array[tuple(map(_plain, whole)) or ...]
        sizes = [i.size for i in whole if isinstance(i, jax.experimental.pallas.Slice)]
        assert list(view.shape[: len(sizes)]) == sizes or not sizes, f"{index} is outside of {self.shape}"
        return view


class _At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        return Ref(self.ref.view(index))


def _plain(index):
    if isinstance(index, jax.experimental.pallas.Slice):
        return slice(int(index.start), int(index.start) + index.size)
    assert isinstance(index, slice) or int(index) >= 0, f"negative index {index}"
    return index if isinstance(index, slice) else int(index)


def _unwritten(shape, dtype) -> np.ndarray:
    return np.full(shape, np.nan if jnp.issubdtype(dtype, jnp.floating) else -(2**31), dtype)


INTEGERS = types.SimpleNamespace(div=np.floor_divide, rem=np.remainder)


class Emulator:
    """Takes the place of ``mosaic_gpu``, in ``modules`` with kernels too; one block after the other."""

    def __init__(self, monkeypatch, *modules):
        self.modules = modules
        self.place: dict[str, np.int32] = {}
        for name in (name for name in dir(self) if not name.startswith("_")):
            for module in (mosaic_gpu, *modules):
                if name not in ("modules", "place") and hasattr(module, name):
                    monkeypatch.setattr(module, name, getattr(self, name))

    def gpu_call(self, body, *, name, grid, out_type, scratch=(), **_):
        def run(*operands):
            inputs = [Ref(np.asarray(t)) for t in operands]
            outputs = [Ref(_unwritten(t.shape, t.dtype)) for t in out_type]
            with pytest.MonkeyPatch.context() as numpy_only, np.errstate(invalid="ignore"):
                for module in self.modules:
                    numpy_only.setattr(module, "jnp", np, raising=False)
                    numpy_only.setattr(module, "lax", INTEGERS, raising=False)
                for place in itertools.product(*(range(n) for n in grid.values())):
                    self.place = dict(zip(grid, map(np.int32, place)))
                    body(*inputs, *outputs, *(Ref(_unwritten(*room)) if room else None for room in scratch))
            return [jnp.asarray(ref.array) for ref in outputs]

        return run

    def walk(self, steps, inputs, outputs, body, carry):
        for step in map(np.int32, range(int(steps))):
            sources = [Ref(tile.at(step).array.copy()) for tile in inputs]
            targets = [Ref(_unwritten(tile.shape, tile.ref.dtype)) for tile in outputs]
            assert [t.shape for t in sources] == [tile.shape for tile in inputs]
            carry = body(step, sources, targets, carry)
            for tile, target in zip(outputs, targets):
                tile.at(step)[...] = target.array
        return carry

    def block(self, axis):
        return self.place[axis]

    def when(self, condition):
        return lambda f: f() if condition else None

    def repeat(self, count, body, carry):
        for step in map(np.int32, range(count)):
            carry = body(step, carry)
        return carry

    def transposed(self, ref):
        return Ref(ref.array.T)

    def load(self, ref, layout):
        return ref[...]

    load_plain = load

    def full(self, shape, value, layout):
        return np.full(shape, value, np.float32)

    def zero_row(self, width):
        return np.zeros(width, np.float32)

    def not_after(self, size):
        return np.tril(np.ones((size, size), bool))

    def matmul(self, *pairs):
        return sum(a.array.astype(np.float32) @ b.array.astype(np.float32) for a, b in pairs)

    def operand(self, rows, columns, dtype):
        return (rows, columns), dtype

    def rows(self, count):
        return (count, mosaic_gpu.THREADS), np.float32

    def over_columns(self, t, columns):
        return np.broadcast_to(t[:, None], (t.shape[0], columns))

    def over_rows(self, t, rows):
        return np.broadcast_to(t, (rows, t.shape[0]))

    def sigmoid(self, t):
        return 1 / (1 + np.exp(-t))

    def publish(self):
        pass

    def barrier(self, arrivals):
        return None

    def fetch_now(self, copies, ready):
        for source, target in copies:
            target[...] = source.array

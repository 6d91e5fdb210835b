"""Corpora of token ids: ``*.npy``, or raw ``*.bin``; memory-mapped where they are local."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from tasks.files import find_files

SUFFIXES = (".npy", ".bin")


def read_arrays(field: str, source: str, pattern: str, dtype: str, vocab_size: int) -> Sequence[np.ndarray]:
    """The 1-D integer arrays of a source; the ids at the head of each are checked here, all others when a
    batch is made."""
    root, paths = find_files(f"task.{field}", source, pattern)
    arrays = [_read(root / path, dtype) for path in paths]
    for path, array in zip(paths, arrays):
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                f"task.{field}: {root / path} holds {array.dtype} of shape {array.shape}; token arrays "
                "are 1-D integers"
            )
        check_ids(array[: 1 << 16], vocab_size, f"task.{field}: {root / path}")
    return arrays


def _read(path: epath.Path, dtype: str) -> np.ndarray:
    local = "://" not in os.fspath(path)
    if path.suffix == ".npy":
        if local:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            return np.load(file, allow_pickle=False)
    size, item = path.stat().length, np.dtype(dtype).itemsize
    if size % item:
        raise ValueError(f"{path} has {size} bytes, no multiple of the {item} of task.token_dtype={dtype!r}")
    if not size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r") if local else np.frombuffer(path.read_bytes(), dtype)


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """ValueError naming ``where`` unless all ``ids`` lie in [0, vocab_size)."""
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        raise ValueError(
            f"{where} holds token ids {int(ids.min())}..{int(ids.max())}, but task.vocab_size={vocab_size} "
            f"allows 0..{vocab_size - 1}: raise task.vocab_size, or check task.token_dtype"
        )

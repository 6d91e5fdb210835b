"""Files of named tensors as models are published: safetensors or torch's .bin, whole or in shards.

``TensorFiles.open(path)`` reads headers only; ``read`` gives a box of one tensor, and nothing else of a file
stays in memory. A .bin is a pickle: torch reads it with its restricted reader, which runs no code of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

Slices = tuple[slice, ...]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LOOKED_FOR = (INDEX, WHOLE, "pytorch_model.bin.index.json", "pytorch_model.bin")
PICKLED = (".bin", ".pt", ".pth")
RANKS = "mp_rank_*/model_optim_rng.pt"  # of Megatron-LM, below the directory of an iteration
INERT = "megatron."  # classes of modules below it are stood in for by ones that do nothing
SHOWN = 8  # names listed in an error message
SHARD_BYTES = 5_000_000_000  # of a written file, at most, unless one tensor is larger
DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
"""Of a safetensors header; the rest (8-bit floats) are no weights that could be trained on."""


class TensorFileError(ValueError):
    """A file of tensors cannot be used; the message names it, and what was expected."""


class Entry(NamedTuple):
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """Tensors by name, in one or several files.

    Attributes:
        path: what was opened.
        entries: shape and dtype of every tensor.
        files: which file each is in.
        pickled: tensors of torch by name, mapped and not read, of the files that are .bin.
    """

    path: Path
    entries: Mapping[str, Entry]
    files: Mapping[str, Path]
    pickled: Mapping[Path, Mapping[str, Any]] = dataclasses.field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> TensorFiles:
        """The tensors of a file, of an index of files, or of a directory with either of them.

        Those of Megatron-LM's ranks have the folder of their rank before their names, "mp_rank_00/...".

        Raises:
            TensorFileError: nothing is there; a file is truncated, damaged, missing, no tensor file, or holds
                other tensors than its index says; torch is needed and not installed.
        """
        path, ranks = _find(Path(path)), rank_files(Path(path))
        listed = _listed(path) if path.name.endswith(".index.json") else None
        entries: dict[str, Entry] = {}
        files: dict[str, Path] = {}
        pickled: dict[Path, dict[str, Any]] = {}
        single = ranks or [path]
        for file in single if listed is None else sorted({path.parent / name for name in listed.values()}):
            if file.suffix in PICKLED:
                prefix = f"{file.parent.name}/" if ranks else ""
                pickled[file] = {prefix + name: t for name, t in _tensors(unpickled(file), file).items()}
                found = {n: Entry(tuple(t.shape), _dtype_of(t, file, n)) for n, t in pickled[file].items()}
            else:
                found = _headers(file)
            for name, entry in found.items():
                if name in files:
                    raise TensorFileError(f"{name} is in two files, {files[name]} and {file}")
                entries[name], files[name] = entry, file
        asked = listed or {}
        lost = [name for name, file in asked.items() if name not in files or files[name].name != file]
        if lost:
            raise TensorFileError(
                f"{path} lists tensors that are not in the files it says: {_some(lost)}; one of the files "
                "is from another checkpoint"
            )
        return cls(path, entries, files, pickled)

    def read(self, name: str, box: Slices) -> np.ndarray:
        """Values of the box of the tensor. Raises TensorFileError if the file changed or cannot be read."""
        file = self.files[name]
        if file in self.pickled:
            return _to_numpy(self.pickled[file][name][box])
        try:
            # Opened anew each time: what stays mapped would count as memory of this process.
            with safetensors.safe_open(file, "numpy") as opened:
                return opened.get_slice(name)[box] if box else opened.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise TensorFileError(f"{file} cannot be read: {error}") from error

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(math.prod(e.shape) * e.dtype.itemsize for e in self.entries.values())


def write(
    directory: Path,
    tensors: Sequence[tuple[str, Entry]],
    value: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write ``tensors`` as Hugging Face does: one safetensors file, or several and their index.

    Args:
        value: of a tensor by name; those of one file are in memory together.

    Returns:
        The files that were written.
    """
    sizes = {name: math.prod(entry.shape) * entry.dtype.itemsize for name, entry in tensors}
    shards = list(_shards(sizes, shard_bytes))
    width, weight_map, written = 5, dict[str, str](), list[Path]()
    for number, names in enumerate(shards, 1):
        file = WHOLE if len(shards) == 1 else f"model-{number:0{width}}-of-{len(shards):0{width}}.safetensors"
        save_file({name: value(name) for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        written.append(directory / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.append(directory / INDEX)
    return written


def rank_files(path: Path) -> list[Path]:
    """The files of Megatron-LM's tensor-parallel ranks in a directory, in order; none in any other."""
    return sorted(path.glob(RANKS)) if path.is_dir() else []


def _find(path: Path) -> Path:
    """The file to open for what was given; the directory itself if it has a file for each rank."""
    if path.is_file() or rank_files(path):
        return path
    if not path.is_dir():
        raise TensorFileError(f"{path} does not exist; give a file of tensors, or the directory it is in")
    for name in LOOKED_FOR:
        if (path / name).exists():
            return path / name
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return single[0]
    there = ", ".join(sorted(p.name for p in path.iterdir())[:SHOWN]) or "nothing"
    raise TensorFileError(f"{path} has no tensors; looked for {', '.join(LOOKED_FOR)} (found: {there})")


def _listed(path: Path) -> dict[str, str]:
    """Tensor to file, of an index."""
    try:
        listed = json.loads(path.read_text())["weight_map"]
        names = {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path} is no index of tensors: it needs an object 'weight_map'") from error
    outside = [file for file in names.values() if Path(file).name != file]
    if outside:
        raise TensorFileError(f"{path} names {outside[0]!r}; the files of an index lie beside it")
    missing = sorted({file for file in names.values() if not (path.parent / file).exists()})
    if missing:
        raise TensorFileError(f"{path} lists files that are not beside it: {_some(missing)}")
    return names


def _headers(file: Path) -> dict[str, Entry]:
    if file.suffix != ".safetensors":
        raise TensorFileError(
            f"{file} is no file of tensors: expected .safetensors, {', '.join(PICKLED)}, or an index of them"
        )
    entries = {}
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                part = opened.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise TensorFileError(
                        f"{file}: {name} is of dtype {part.get_dtype()}, not in {[*DTYPES]}"
                    )
                entries[name] = Entry(tuple(part.get_shape()), DTYPES[part.get_dtype()])
    except (OSError, safetensors.SafetensorError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise TensorFileError(
            f"{file} ({size:,} bytes) is truncated or no safetensors file: {error}. Fetch it again"
        ) from error
    return entries


def unpickled(file: Path) -> Any:
    """What a pickle of torch holds: tensors, mapped and not read, and plain values.

    Raises:
        TensorFileError: torch is not installed; or the file is truncated or would run code.
    """
    try:
        import torch
    except ImportError as error:
        raise TensorFileError(
            f"{file} is a pickle of torch; to read it: pip install torch (a CPU build will do), or convert "
            "it to safetensors"
        ) from error
    zipped = zipfile.is_zipfile(file)
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipped else []
        inert: list[Any] = [(_Inert, name) for name in named if name.startswith(INERT)]
        with torch.serialization.safe_globals([argparse.Namespace, *inert]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # pickles that are refused, truncated archives, other formats
        reason = str(error).strip().split("\n")[0]
        raise TensorFileError(
            f"{file} is refused: it is truncated, or holds more than tensors, and code in it is never run "
            f"({type(error).__name__}: {reason[:300]})"
        ) from error


class _Inert:
    """Stands in for a class that a file names, such as an enumeration of Megatron-LM."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass


def _tensors(loaded: Any, file: Path) -> dict[str, Any]:
    """The tensors of a .bin by name. What else is in it, such as states of modules, is left out."""
    import torch

    for key in ("state_dict", "model"):  # as some programs wrap it
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    named = loaded if isinstance(loaded, dict) else {}
    tensors = {str(name): t for name, t in named.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise TensorFileError(f"{file} holds no tensors by name, but {type(loaded).__name__}")
    return tensors


def _dtype_of(tensor: Any, file: Path, name: str) -> np.dtype:
    spelt = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(ml_dtypes.bfloat16 if spelt == "bfloat16" else spelt)
    except TypeError as error:
        raise TensorFileError(f"{file}: {name} is of dtype {spelt}, which is not supported") from error


def _to_numpy(tensor: Any) -> np.ndarray:
    """A copy. torch gives numpy no bfloat16, so that goes through its bits."""
    import torch

    if tensor.dtype != torch.bfloat16:
        return np.array(tensor.numpy())
    return np.array(tensor.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most ``most`` bytes."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

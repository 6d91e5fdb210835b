"""A published checkpoint becomes a run: parameters read a part at a time, straight into their shardings."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from rich import progress as bars
from rich.console import Console

from configs.base import Experiment
from configs.beacon import with_beacons
from configs.hmt import with_memory
from models.beacon_config import BeaconLMConfig
from models.hmt_config import HMTConfig
from objectives import model_of
from runtime import mesh as meshes
from runtime import run_record
from runtime.checkpoint import save_alone
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig
from tasks.lm import LMTaskConfig
from tools.convert.published_files import ConvertError, PublishedFiles, copy_tokenizer

PUBLISHED = "published.json"  # format and config of the checkpoint, in the run; export writes it back
DTYPES = ("float32", "bfloat16")
LENGTH, LONGEST = 2048, 4096  # tokens of a row where the config names no length; at most, where it does
LENGTHS = ("max_position_embeddings", "n_positions")
STEP = 0

Advance = Callable[[int], None]  # so many bytes were read
Say = Callable[[str], None]


def import_checkpoint(
    source: str | Path,
    to: epath.PathLike,
    *,
    dtype: str | None = None,
    mesh: MeshConfig | None = None,
    tokenizer: str | None = None,
    seq_len: int | None = None,
    vocab_multiple: int | None = None,
    say: Say = print,
) -> Experiment:
    """Write the run ``to`` from a published checkpoint; returns its config.

    Args:
        source: a directory, or a file of tensors with config.json beside it.
        to: of the run; may not hold anything. It appears at the end, complete, or not at all.
        dtype: of the parameters, "float32" or "bfloat16" (dynamics keep theirs); None for that of the file.
        mesh: over all devices; None splits parameters over all of them (fsdp).
        tokenizer: a directory or tokenizer.json in place of the checkpoint's own; "none" for none.
        seq_len: tokens of a row for who trains or probes the run; None for what the config says.
        vocab_multiple: pads the vocabulary with zeros, so that a head divides over devices.

    Raises:
        ConvertError, TensorFileError: the checkpoint cannot be used, or ``to`` is taken.
        CheckpointError: the run could not be written.
    """
    if dtype not in (None, *DTYPES):
        raise ConvertError(
            f"--dtype={dtype} is unknown; use one of {', '.join(DTYPES)}, or none for the file's"
        )
    with appearing(to) as out:
        opened = PublishedFiles.open(source, vocab_multiple)
        config = compute_in(opened, dtype)
        where = opened.directory if tokenizer is None else Path(tokenizer)
        with_text = tokenizer != "none" and copy_tokenizer(where, out, config.vocab_size)
        if not with_text:
            say(
                "no tokenizer.json: the run reads and writes ids only. To add one: --tokenizer=DIR (of slow "
                "tokenizers, transformers' AutoTokenizer.from_pretrained(...).save_pretrained(DIR) makes one)"
            )
        length = seq_len or min([LONGEST, *(opened.raw[n] for n in LENGTHS if opened.raw.get(n))])
        if seq_len is None and not any(opened.raw.get(n) for n in LENGTHS):
            length = LENGTH
        experiment = experiment_of(opened, config, length, with_text)
        params = load(opened, experiment, mesh or MeshConfig(data=1, fsdp=-1), dtype)
        save_alone(out, STEP, {"params": params})
        if jax.process_index() == 0:
            record = {"format": opened.format, "config": opened.raw}
            (out / PUBLISHED).write_text(json.dumps(record, indent=2) + "\n")
        run_record.save_config(out, experiment.to_json())
    return experiment


@contextlib.contextmanager
def appearing(directory: epath.PathLike) -> Iterator[epath.Path]:
    """A new directory to fill, which takes the name ``directory`` when all is well, and else is removed.

    On remote storage, where a directory cannot be renamed, it is ``directory`` itself.

    Raises:
        ConvertError: ``directory`` holds something.
    """
    target = epath.Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConvertError(f"{target} is not empty; give a directory that does not exist")
    local = "://" not in str(target)
    target = epath.Path(target.absolute()) if local else target
    unfinished = target.parent / f".{target.name}.unfinished" if local else target
    first = jax.process_index() == 0
    try:
        if first:
            if local and unfinished.exists():  # of a conversion that was killed
                unfinished.rmtree()
            unfinished.mkdir(parents=True, exist_ok=True)
        _together("begin")
        yield unfinished
        _together("end")
        if first and local:
            unfinished.rename(target)
    except BaseException:
        if first and unfinished.exists():
            unfinished.rmtree()
        raise


def _together(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"convert: {where}")


def compute_in(opened: PublishedFiles, dtype: str | None) -> Any:
    """The config of the model, computing in the dtype of its parameters; in float32 for float16."""
    sizes: dict[str, int] = {}
    for entry in opened.tensors.entries.values():
        sizes[entry.dtype.name] = sizes.get(entry.dtype.name, 0) + math.prod(entry.shape)
    stored = dtype or max(sizes, key=lambda name: sizes[name])
    config = opened.config
    config.dtype = stored if stored in DTYPES else "float32"
    config.attention.cache_dtype = config.cca.cache_dtype = config.dtype
    return config


def experiment_of(opened: PublishedFiles, config: Any, length: int, with_text: bool) -> Experiment:
    """The config of the run: the model, rows of ``length`` tokens, and no source of text."""
    experiment = Experiment(
        name=str(opened.raw.get("_name_or_path") or opened.directory.absolute().name),
        model=config,
        # Without a source: what the checkpoint was trained on is not here.
        task=LMTaskConfig(source="", seq_len=length, vocab_size=None if with_text else config.vocab_size),
        optim=OptimConfig(lr=3e-4),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    if isinstance(config, HMTConfig):
        return with_memory(experiment, config.memory)
    if isinstance(config, BeaconLMConfig):
        return with_beacons(experiment, config.beacon)
    return experiment


def load(opened: PublishedFiles, experiment: Experiment, mesh: MeshConfig, dtype: str | None) -> Any:
    """The parameters as a nested dict, each part of them read by the process, and onto the device, it is for.

    Raises:
        ConvertError: the mesh does not fit the devices, or does not divide the parameters.
    """
    model = model_of(experiment)
    try:
        over = meshes.make_mesh(mesh)
        shardings = nnx.traversals.flatten_mapping(meshes.param_shardings(over, model.axes, model.shapes))
    except ValueError as error:
        raise ConvertError(f"--mesh: {error}") from error
    roles = nnx.traversals.flatten_mapping(model.roles)
    dtypes = {path: _dtype(opened.dtype(path), roles[path], dtype) for path in opened.sources}
    total = sum(
        math.prod(source.shape) * opened.dtype(path).itemsize * _share(shardings[path], source.shape)
        for path, source in opened.sources.items()
    )
    flat = {}
    with _bar(round(total)) as advance:

        def read(name: str, box: tuple[slice, ...]) -> np.ndarray:
            values = opened.tensors.read(name, box)
            advance(values.nbytes)
            return values

        for path, source in opened.sources.items():
            values = functools.partial(source.read, read, dtype=dtypes[path])
            flat[path] = placed(source.shape, shardings[path], values)
    return nnx.traversals.unflatten_mapping(flat)


def placed(
    shape: tuple[int, ...], sharding: Sharding, values: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array of which every part is read once, and is on its devices before the next is read.

    ``jax.make_array_from_callback`` has all parts in memory a second time: up to a third of a model, where
    the weights of its layers are stacked.
    """
    arrays = []
    for box, devices in _parts(sharding, shape):
        part = values(box)
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _parts(sharding: Sharding, shape: tuple[int, ...]) -> list[tuple[tuple[slice, ...], list[jax.Device]]]:
    """The boxes of an array that devices of this process hold, each with those that hold it."""
    holders: dict[str, tuple[tuple[slice, ...], list[jax.Device]]] = {}
    for device, box in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(str(box), (box or (), []))[1].append(device)
    return list(holders.values())


def _dtype(stored: np.dtype, role: str, asked: str | None) -> np.dtype:
    """Of a parameter. Dynamics lose too much in bfloat16, and are few."""
    if asked is None or (asked == "bfloat16" and role.startswith("dynamics")):
        return stored
    return jnp.dtype(asked)


def _share(sharding: Sharding, shape: tuple[int, ...]) -> float:
    """Which part of a parameter this process reads."""
    return len(_parts(sharding, shape)) * math.prod(sharding.shard_shape(shape)) / math.prod(shape)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Advance]:
    """A bar of bytes on process 0."""
    columns = (
        bars.TextColumn("reading"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, disable=jax.process_index() != 0) as bar:
        task = bar.add_task("", total=total)
        yield lambda n: bar.advance(task, n)


def mesh_of(text: str) -> MeshConfig:
    """ "fsdp=4,tensor=2" as a mesh; axes not named are 1. Raises ConvertError."""
    mesh = MeshConfig(data=1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in meshes.AXES or not size.removeprefix("-").isdecimal():
            raise ConvertError(
                f"--mesh={text}: {part!r} should be AXIS=SIZE with an axis of {', '.join(meshes.AXES)}"
            )
        setattr(mesh, axis, int(size))
    return mesh

"""The programs of a run, described and not executed: the loop's own train step, and those of generation."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import train
from configs.base import BaseExperiment
from eval.decode import PIECE, programs_of, taken_apart
from eval.sampling import Sampling
from pallas_kernels import tuning
from runtime import mesh as meshes
from tasks.sources import INSTALLED, SourceConfig

NAMES = ("train", "prefill", "decode")
# Of XLA's refusals, as in "(384.00G) exceeds available HBM (15.75G)" and "Used 24.6G of 15.75G hbm".
_REFUSAL = re.compile(
    r"\(([\d.]+)([KMGT]?)\) exceeds available|Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", re.I
)
_SHARE = re.compile(r"Size: ([\d.]+)([KMGT]?)\b.*?(?:op_name=\"([^\"]*)\")?[^\n]*\n\s*Shape: (\S+)", re.S)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Described:
    """A program to compile.

    Attributes:
        function: jitted.
        arguments: what it takes, shapes with shardings.
        parts: names of what the arguments hold, to their trees.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    parts: dict[str, Any]


class OutOfMemory(RuntimeError):
    """The compiler refuses a program that needs more main memory than a device has.

    Attributes:
        needed: bytes as it says, 0 where it does not.
        shares: its list of the largest allocations, (bytes, origin, shape).
    """

    def __init__(self, message: str):
        super().__init__(message)
        match = _REFUSAL.search(message)
        number, unit = (match[1] or match[3], match[2] or match[4]) if match else ("0", "")
        self.needed = int(float(number) * _UNITS[unit.upper()])
        self.shares = [
            (int(float(size) * _UNITS[unit]), origin or "", shape)
            for size, unit, origin, shape in _SHARE.findall(message)
        ]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program and the seconds that tracing with lowering, and compiling, took."""

    program: Described
    executable: jax.stages.Compiled
    lower_seconds: float
    compile_seconds: float


def compile_program(setup: train.Setup, program: Described) -> Compiled:
    """``program`` through the TPU compiler, with the mesh and the precision of the run in force.

    Raises:
        OutOfMemory: XLA refused it.
    """
    chip = tuning.chip_of_kind(setup.mesh.devices.flat[0].device_kind)  # else block sizes are this machine's
    precision = jax.default_matmul_precision(setup.config.train.matmul_precision)
    with jax.set_mesh(setup.mesh), precision, tuning.chip(chip or "tpu"):
        start = time.perf_counter()
        lowered = program.function.lower(*program.arguments)
        middle = time.perf_counter()
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OutOfMemory(str(error)) from error
            raise
    return Compiled(program, executable, middle - start, time.perf_counter() - middle)


@contextlib.contextmanager
def setup_on(config: BaseExperiment, devices: Any) -> Iterator[train.Setup]:
    """``train.setup`` for described devices. Text that is not installed is replaced by zeros: no data is
    needed here, only its shapes. ``config`` is changed. Raises ConfigError."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config.task, SourceConfig) and config.task.source not in INSTALLED:
            _stand_in(config, pathlib.Path(folder))
        yield train.setup(config, list(devices))


def _stand_in(config: Any, folder: pathlib.Path) -> None:
    """Point the task to enough zeros for a batch: a sparse file, which takes no room."""
    task, file = config.task, folder / "zeros.bin"
    with file.open("wb") as out:
        out.truncate(3 * task.batch_size * task.seq_len * np.dtype(task.token_dtype).itemsize)
    task.source, task.eval_source, task.eval_fraction = str(file), "", 0.3
    task.vocab_size = task.vocab_size or config.model.vocab_size
    task.max_train_tokens = None


def describe(setup: train.Setup, name: str, rows: int | None = None, context: int | None = None) -> Described:
    """One of ``NAMES``.

    Args:
        rows: of a batch of prompts; None for one a device along the mesh axes that split batches.
        context: tokens that generation has room for; None for the length of training rows.

    Raises:
        ValueError: generation of a model that makes no text, or rows that the mesh does not divide.
    """
    if name == "train":
        batch = _batch(setup)
        state, other = setup.abstract, setup.abstract.extras
        parts = {"parameters": state.params, "optimizer": state.opt_state, "batch": batch}
        parts |= {"extras": other} if other else {}
        return Described(name, setup.train_step, (state, batch), parts)
    return _generation(setup, name, rows, context)


def _batch(setup: train.Setup) -> Any:
    """The first batch of the run, described: one row is made, for its shapes."""
    task, size = setup.objective.task, setup.objective.task.config.batch_size
    rows = task.train(slice(0, 1))[0]
    return {name: _array(setup.mesh, (size * len(a), *a.shape[1:]), a.dtype) for name, a in rows.items()}


def _array(mesh: jax.sharding.Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """[B, L, ...] as batches are laid out."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(mesh, len(shape)))


def _generation(setup: train.Setup, name: str, rows: int | None, context: int | None) -> Described:
    """A piece of the prompts (at most ``eval.decode.PIECE`` tokens), or one token more."""
    mesh, model, task = setup.mesh, setup.model, setup.objective.task.config
    module = model.bind(model.shapes)
    if not hasattr(module, "logits"):
        raise ValueError(f"{type(module).__name__} makes no text: use --programs=train")
    split = math.prod(mesh.shape[axis] for axis in meshes.BATCH)
    rows, context = rows or split, context or task.seq_len
    if rows % split:
        raise ValueError(f"--rows={rows} must be a multiple of {split} = mesh.data x mesh.fsdp")
    functions = programs_of(model, Sampling(temperature=0.0), 1)
    params = setup.abstract.params
    with jax.set_mesh(mesh):
        empty = jax.eval_shape(lambda p: model.bind(p).init_state(rows, context), params)
    by_row, whole = jax.NamedSharding(mesh, jax.P(meshes.BATCH)), jax.NamedSharding(mesh, jax.P())
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=by_row if a.ndim else whole), empty
    )
    parts = {"parameters": params, "state": state}
    if name == "prefill":
        ids = jax.ShapeDtypeStruct((rows, min(PIECE, context)), np.int32, sharding=by_row)
        return Described(name, functions.read, (params, ids, ids, state, None), parts)

    def one_more(params: Any, keys: Any, carry: Any) -> Any:
        return functions.go_on(params, taken_apart(model, params), keys, carry)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=by_row)
    token = jax.ShapeDtypeStruct((rows,), np.int32, sharding=by_row)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
    arguments = params, keys, (token, state, None, step)
    return Described(name, jax.jit(one_more, donate_argnums=2), arguments, parts)


def device_bytes(tree: Any) -> int:
    """Bytes of one device's parts of described arrays, without padding."""
    sizes = (
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(_stored(leaf.dtype)).itemsize
        for leaf in jax.tree.leaves(tree)
    )
    return sum(sizes)


def _stored(dtype: Any) -> Any:
    return np.uint64 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype

"""How every GPU kernel here is called (Mosaic GPU, Hopper): one place for what differs between versions.

A kernel is a block of one warpgroup, 128 threads. Arrays of 128 * k elements lie k to a thread; matrices that
meet the tensor cores lie as ``plgpu.Layout.WGMMA``. Most kernels :func:`walk` along time: the copy engine
brings the next tile into shared memory while the threads work on this one.

No GPU has run these kernels yet, so they are taken by name only. What is known: they lower for CUDA, from any
host; block by block in numpy they equal the references, gradients too (tests); and with ``interpret``, the
simulation of copies, barriers and races that comes with Pallas (``InterpretGPUParams``, all of it from jax
0.12), they do as well. That takes a block for one thread: what passes between the 128 of them it cannot see.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128  # of one warpgroup
DEPTH = 2  # tiles in flight
Carry = TypeVar("Carry")
Value = Any  # what a kernel computes with: an array over the threads of a block, or a number
# Matrices of 16 bits in shared memory, as the tensor cores read them: 8 rows of 64 a piece, swizzled.
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def gpu_call(
    body: Callable[..., None],
    *,
    name: str,
    grid: Mapping[str, int],
    out_type: Sequence,
    scratch: Sequence = (),
    private_rows: bool = False,
    interpret: Any = None,
) -> Callable[..., list[jax.Array]]:
    """``plgpu.kernel`` with the layouts as written (in lane semantics nothing is inferred).

    Args:
        body: of references to inputs, outputs and ``scratch``; finds its place by ``lax.axis_index(axis)``.
        grid: axis name to number of blocks.
        out_type: what the outputs are like: anything with a shape and a dtype.
        private_rows: no thread reads shared memory that another thread wrote, so that stores need no barriers
            around them. (Copies have their own.)
        interpret: None, or parameters of the simulation.
    """
    parameters = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=private_rows
    )
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(t.shape, t.dtype) for t in out_type],
        scratch_types=list(scratch),
        compiler_params=parameters,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        interpret=interpret,
        kernel_name=name,
    )


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one step of :func:`walk` copies of an array in global memory.

    Attributes:
        ref: the whole array.
        shape: of the tile, without the axes at which ``index`` has a number.
        index: of the step, where the tile lies: a number or ``pl.ds`` for each axis.
        transforms: layout in shared memory.
    """

    ref: Any
    shape: tuple[int, ...]
    index: Callable[[Value], tuple]
    transforms: tuple = ()

    def buffers(self):
        """Shared memory for ``DEPTH`` steps of it."""
        return plgpu.SMEM((DEPTH, *self.shape), self.ref.dtype, transforms=self.transforms)

    def at(self, step: Value):
        """The part of global memory that a step moves."""
        return self.ref.at[self.index(step)]


def walk(
    steps: int | Value,
    inputs: Sequence[Tile],
    outputs: Sequence[Tile],
    body: Callable[[Value, list, list, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Steps in order, each with its tiles in shared memory; copies of other steps go on meanwhile.

    Args:
        body: of (step, references to the input tiles, to the output tiles, carry); gives the next carry.
    """

    def scoped(in_buffers, out_buffers, ready):
        def fetch(step, slot):
            for tile, buffer in zip(inputs, in_buffers):
                plgpu.copy_gmem_to_smem(tile.at(step), buffer.at[slot], ready.at[slot])

        for step in range(DEPTH):
            pl.when(step < steps)(functools.partial(fetch, jnp.int32(step), step))

        def one(step, carry):
            slot = lax.rem(step, jnp.int32(DEPTH))
            plgpu.barrier_wait(ready.at[slot])
            # The copies out of this slot, DEPTH steps ago, have read it.
            plgpu.wait_smem_to_gmem((DEPTH - 1) * len(outputs), wait_read_only=True)
            carry = body(step, [b.at[slot] for b in in_buffers], [b.at[slot] for b in out_buffers], carry)
            plgpu.commit_smem()  # every thread is done with the slot
            for tile, buffer in zip(outputs, out_buffers):
                plgpu.copy_smem_to_gmem(buffer.at[slot], tile.at(step))
            pl.when(step + DEPTH < steps)(lambda: fetch(step + DEPTH, slot))
            return carry

        last = lax.fori_loop(jnp.int32(0), jnp.asarray(steps, jnp.int32), one, carry)
        plgpu.wait_smem_to_gmem(0)
        return last

    return pl.run_scoped(
        scoped,
        [tile.buffers() for tile in inputs],
        [tile.buffers() for tile in outputs],
        plgpu.Barrier(num_arrivals=len(inputs), num_barriers=DEPTH),
    )


# What a kernel's body is written in. All of it is named here, so that a body can also be run with numpy.
block = lax.axis_index  # this block's place along an axis of the grid
when = pl.when
sigmoid = jax.nn.sigmoid
transposed = functools.partial(plgpu.transpose_ref, permutation=(1, 0))
MATRIX = plgpu.Layout.WGMMA  # how the tensor cores leave [64 m, 8 n]
OF_ROWS, OF_COLUMNS = MATRIX.reduce(1), MATRIX.reduce(0)  # one number for each row, for each column


def repeat(count: int, body: Callable[[Value, Carry], Carry], carry: Carry) -> Carry:
    """``lax.fori_loop`` from 0 with a 32-bit counter."""
    return lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)


def load(ref, layout) -> Value:
    """All of ``ref`` in shared memory, laid over the threads as ``layout``."""
    return plgpu.layout_cast(ref[...], layout)


def load_plain(ref, layout) -> Value:
    """:func:`load` of memory that is not swizzled, or global, element by element."""
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # jax 0.10
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: float, layout) -> Value:
    """``value`` everywhere, float32, in ``layout``."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def zero_row(width: int) -> Value:
    """Zeros [width] that lie as a row that was read: width / 128 to a thread."""
    return full((width,), 0.0, plgpu.Layout.WG_STRIDED((width,), width // THREADS))


def over_columns(t: Value, columns: int) -> Value:
    """[M] to [M, columns]: one number for each row, everywhere in it."""
    return lax.broadcast_in_dim(t, (t.shape[0], columns), (0,))


def over_rows(t: Value, rows: int) -> Value:
    """[N] to [rows, N]: one number for each column, everywhere in it."""
    return lax.broadcast_in_dim(t, (rows, t.shape[0]), (1,))


def not_after(size: int) -> Value:
    """[size, size]: whether j <= i."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (size, size), axis, layout=MATRIX) for axis in (0, 1))
    return j <= i


def matmul(*pairs) -> Value:
    """The sum of the products a b of pairs in shared memory, [M, K] and [K, N] of 16 bits, in float32."""

    def scoped(total):
        for a, b in pairs:
            plgpu.wgmma(total, a, b)
        return total[...]  # waits

    (a, b), *_ = pairs
    return pl.run_scoped(scoped, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def operand(rows: int, columns: int, dtype) -> Any:
    """Room in shared memory for a matrix that the tensor cores read."""
    return plgpu.SMEM((rows, columns), dtype, transforms=OPERAND)


def rows(count: int) -> Any:
    """Room in shared memory for rows of which each thread has one element."""
    return plgpu.SMEM((count, THREADS), jnp.float32)


def publish() -> None:
    """What this block wrote to shared memory is there for the tensor cores and the copy engine."""
    plgpu.commit_smem()


def barrier(arrivals: int) -> Any:
    """For :func:`fetch_now` of so many arrays."""
    return plgpu.Barrier(num_arrivals=arrivals)


def fetch_now(copies: Sequence[tuple[Any, Any]], ready) -> None:
    """Copy from global to shared memory, and wait."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, ready)
    plgpu.barrier_wait(ready)

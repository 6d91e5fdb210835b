"""How every GPU kernel here is called (Mosaic GPU, Hopper): one place for what differs between versions.

A kernel is a block of one warpgroup, 128 threads. Arrays of 128 * k elements lie k to a thread; matrices that
meet the tensor cores lie as ``plgpu.Layout.WGMMA``. Most kernels :func:`walk` along time: the copy engine
brings the next tile into shared memory while the threads work on this one.

None of these kernels has run on a GPU yet. They are lowered for CUDA from any host, and the simulation of a
GPU that comes with Pallas runs them on CPU (``interpret``).
"""

from __future__ import annotations

import dataclasses
import functools
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


def gpu_call(
    body: Callable[..., None],
    *,
    name: str,
    grid: Mapping[str, int],
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence = (),
    private_rows: bool = False,
    interpret: Any = None,
) -> Callable[..., Sequence[jax.Array]]:
    """``plgpu.kernel`` with the layouts as written (in lane semantics nothing is inferred).

    Args:
        body: of references to inputs, outputs and ``scratch``; finds its place by ``lax.axis_index(axis)``.
        grid: axis name to number of blocks.
        private_rows: no thread reads shared memory that another thread wrote, so that stores need no barriers
            around them. (Copies have their own.)
        interpret: None, or parameters of the simulation.
    """
    parameters = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=private_rows
    )
    return plgpu.kernel(
        body,
        out_type=list(out_type),
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
    index: Callable[[jax.Array], tuple]
    transforms: tuple = ()

    def buffers(self):
        return plgpu.SMEM((DEPTH, *self.shape), self.ref.dtype, transforms=self.transforms)

    def at(self, step: jax.Array):
        return self.ref.at[self.index(step)]


def walk(
    steps: int | jax.Array,
    inputs: Sequence[Tile],
    outputs: Sequence[Tile],
    body: Callable[[jax.Array, list, list, Carry], Carry],
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


def zero_row(width: int) -> jax.Array:
    """Zeros [width] in float32 that lie as a row that was read: width / 128 to a thread."""
    layout = plgpu.Layout.WG_STRIDED((width,), width // THREADS)
    return plgpu.layout_cast(jnp.zeros(width, jnp.float32), layout)

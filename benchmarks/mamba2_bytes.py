"""What a Mamba-2 layer moves on TPU, by how the op between its projections is put together.

    python -m benchmarks.mamba2_bytes [chip]

Programs are compiled for a chip that need not be there, and the bytes of what was compiled are counted
(``benchmarks/hlo_bytes.py``): the op alone, convolution to gated norm, and the layer around it, both forward
and with the gradient. Alone, the compiler chooses the layouts of the op's arguments and results, as it
does between products, which read and write any; what it could fuse into those products is charged to the op.
The layer less its projections would not be charged for that, but does not work: compiled by themselves the
projections move more (their input is fetched once for each, in the layer it stays in fast memory). Nothing is
run, and no time is measured.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import hlo_bytes
from layers.mamba2 import Mamba2, Mamba2Config
from pallas_kernels.mamba2 import Inputs, gated_ssd, unfused
from runtime import aot

D_MODEL, LENGTH = 2560, 8192
NOTHING: dict[str, jax.Array | None] = {"x": None, "B": None, "C": None}


def chain(inputs, weights, form, *, implementation: str):
    """The op as a chain of ops, each by ``implementation``."""
    return unfused.gated_ssd(inputs, weights, NOTHING, None, None, form, implementation=implementation)


OPS: dict[str, Callable] = {
    "fused": functools.partial(gated_ssd, implementation="pallas_tpu"),
    "a kernel for each op": functools.partial(chain, implementation="pallas_tpu"),
    "xla": functools.partial(chain, implementation="xla"),
}


def op_bytes(chip: str, op: str, train: bool, d_model: int = D_MODEL, length: int = LENGTH) -> int:
    """Bytes of the op ``op`` of ``OPS`` alone, for one row of a layer of default shape in bfloat16."""
    graph, state, x = _layer(d_model, length)

    def between(state, x):
        layer = nnx.merge(graph, state)
        return _project(layer, x), layer.weights()

    inputs, weights = jax.eval_shape(between, state, x)
    form = nnx.merge(graph, state).form(length)

    def run(inputs, weights):
        return OPS[op](inputs, weights, form)[0]

    return _moved(chip, run, (inputs, weights), inputs.x if train else None, any_layout=True)


def layer_bytes(chip: str, op: str, train: bool, d_model: int = D_MODEL, length: int = LENGTH) -> int:
    """Bytes of the whole layer, its projections included, with the op ``op`` of ``OPS``."""
    graph, state, x = _layer(d_model, length)

    def run(state, x):
        layer = nnx.merge(graph, state)
        return layer.out(OPS[op](_project(layer, x), layer.weights(), layer.form(length))[0])

    return _moved(chip, run, (state, x), x if train else None)


def _layer(d_model: int, length: int):
    """Graph and described state of the layer, and its described input."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Mamba2(d_model, Mamba2Config(), rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), state)
    return graph, state, jax.ShapeDtypeStruct((1, length, d_model), jnp.bfloat16)


def _project(layer: Mamba2, x) -> Inputs:
    return Inputs(layer.in_z(x), layer.in_x(x), layer.in_B(x), layer.in_C(x), layer.in_dt(x))


def _moved(chip: str, function: Callable, args: tuple, cotangents: Any, *, any_layout: bool = False) -> int:
    """Bytes of the program compiled for ``chip``; with its gradient if there are ``cotangents``."""

    def with_gradient(cotangents, *args):
        y, vjp = jax.vjp(function, *args)
        return y, vjp(cotangents)

    program, args = (function, args) if cotangents is None else (with_gradient, (cotangents, *args))
    text = aot.compile_for(chip, program, *args, any_layout=any_layout).as_text()
    assert text is not None
    return sum(row.bytes for row in hlo_bytes.count(program, text, *args))


def main(chip: str = "v5e") -> None:
    print(f"Mamba-2 of 2.7B, B=1 L={LENGTH} H=80 P=64 N=128 G=1 bf16, {chip}: MB")
    print(f"  {'':20} {'':22} {'op alone':>10} {'layer':>10}")
    for train in (False, True):
        for op in OPS:
            sizes = (f"{count(chip, op, train) / 1e6:10.0f}" for count in (op_bytes, layer_bytes))
            print(f"  {'forward + backward' if train else 'forward':20} {op:22}", *sizes, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

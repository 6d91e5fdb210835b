"""What a Mamba-2 layer moves between its projections on TPU, by how its op is put together.

    python -m benchmarks.mamba2_bytes [chip]

The layer is compiled for a chip that need not be there, forward and with its backward, and the bytes of the
compiled program are counted (``benchmarks/hlo_bytes.py``). From them are taken those of the projections
alone, compiled the same way. Nothing is run, and no time is measured.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import hlo_bytes
from layers.mamba2 import Mamba2, Mamba2Config
from pallas_kernels.mamba2 import Inputs, gated_ssd, unfused
from runtime import aot

NOTHING: dict[str, jax.Array | None] = {"x": None, "B": None, "C": None}


def chain(inputs, weights, form, *, implementation: str | None):
    """The op as a chain of ops, each by ``implementation``."""
    return unfused.gated_ssd(inputs, weights, NOTHING, None, None, form, implementation=implementation)


OPS: dict[str, Callable] = {
    "fused": gated_ssd,
    "a kernel for each op": functools.partial(chain, implementation=None),
    "xla": functools.partial(chain, implementation="xla"),
}


def between_projections(
    chip: str, d_model: int, length: int, train: bool, names=tuple(OPS)
) -> dict[str, int]:
    """Bytes by the names of ``OPS``, of one row in bfloat16 and a layer of default shape."""
    module = nnx.eval_shape(lambda: Mamba2(d_model, Mamba2Config(), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), state)
    x = jax.ShapeDtypeStruct((1, length, d_model), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((1, length, module.config.inner(d_model)), jnp.bfloat16)

    def inputs(layer: Mamba2, x: jax.Array) -> Inputs:
        return Inputs(layer.in_z(x), layer.in_x(x), layer.in_B(x), layer.in_C(x), layer.in_dt(x))

    def projections(state, x, y):
        layer = nnx.merge(graph, state)
        return inputs(layer, x), layer.out(y)

    def whole(op, state, x):
        layer = nnx.merge(graph, state)
        return layer.out(op(inputs(layer, x), layer.weights(), layer.form(length))[0])

    alone = _bytes(chip, projections, train, state, x, y)
    return {
        name: _bytes(chip, functools.partial(whole, OPS[name]), train, state, x) - alone for name in names
    }


def _bytes(chip: str, function: Callable, train: bool, *args) -> int:
    if train:
        forward, cotangents = function, jax.eval_shape(function, *args)

        def function(cotangents, *args):
            outputs, vjp = jax.vjp(forward, *args)
            return outputs, vjp(cotangents)

        args = (cotangents, *args)
    text = aot.compile_for(chip, function, *args).as_text()
    assert text is not None
    return sum(row.bytes for row in hlo_bytes.count(function, text, *args))


def main(chip: str = "v5e") -> None:
    print(f"Mamba-2 layer of 2.7B, B=1 L=8192 H=80 P=64 N=128 G=1 bf16, {chip}: MB between the projections")
    for train in (False, True):
        sizes = between_projections(chip, 2560, 8192, train)
        for name, size in sizes.items():
            print(f"  {'forward + backward' if train else 'forward':20} {name:22} {size / 1e6:8.0f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What a Mamba-2 layer moves on TPU, by how the op between its projections is put together.

    python -m benchmarks.mamba2_bytes [chip]

The layer, its projections included, is compiled for a chip that need not be there, forward and with its
backward, and the bytes of the compiled program are counted (``benchmarks/hlo_bytes.py``). The projections
move the same in all; what they share with their neighbours (a gate in the epilogue of a product) the compiler
decides, so they are not taken off. Nothing is run, and no time is measured.
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
    "fused": functools.partial(gated_ssd, implementation="pallas_tpu"),
    "a kernel for each op": functools.partial(chain, implementation=None),
    "xla": functools.partial(chain, implementation="xla"),
}


def layer_bytes(chip: str, d_model: int, length: int, train: bool, name: str) -> int:
    """Bytes of the layer of default shape with the op ``name`` of ``OPS``, for one row in bfloat16."""
    module = nnx.eval_shape(lambda: Mamba2(d_model, Mamba2Config(), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    state = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), state)
    x = jax.ShapeDtypeStruct((1, length, d_model), jnp.bfloat16)

    def forward(state, x):
        layer = nnx.merge(graph, state)
        inputs = Inputs(layer.in_z(x), layer.in_x(x), layer.in_B(x), layer.in_C(x), layer.in_dt(x))
        return layer.out(OPS[name](inputs, layer.weights(), layer.form(length))[0])

    def both(state, x, dy):
        y, vjp = jax.vjp(forward, state, x)
        return y, vjp(dy)

    function, args = (both, (state, x, x)) if train else (forward, (state, x))
    text = aot.compile_for(chip, function, *args).as_text()
    assert text is not None
    return sum(row.bytes for row in hlo_bytes.count(function, text, *args))


def main(chip: str = "v5e") -> None:
    print(f"Mamba-2 layer of 2.7B, B=1 L=8192 H=80 P=64 N=128 G=1 bf16, {chip}: MB of the whole layer")
    for train in (False, True):
        for name in OPS:
            size = layer_bytes(chip, 2560, 8192, train, name)
            print(
                f"  {'forward + backward' if train else 'forward':20} {name:22} {size / 1e6:8.0f}", flush=True
            )


if __name__ == "__main__":
    main(*sys.argv[1:])

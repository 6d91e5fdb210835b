"""What a Mamba-2 layer moves on TPU between its projections, by how the op there is put together.

    python -m benchmarks.mamba2_bytes [chip]

Programs are compiled for a chip that need not be there, and the bytes of what was compiled are counted
(``benchmarks/hlo_bytes.py``). The op's share is the layer's bytes less those of a program that is only the
projections: they read x and write z, x, B, C and dt, read y and write the result, and backward likewise. So
the op is charged for what it reads of them and for nothing that the compiler fuses into a product. Compiled
alone, each op of its own in the layouts it likes best (the products write any), it has no neighbours to fuse
into: the second count. Nothing is run, and no time is measured.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
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


class Layer:
    """A Mamba-2 layer of default shape, its op by a name of ``OPS``, as functions of arrays.

    ``state`` and ``x`` [1, L, D] bfloat16 are what they take, described; ``between`` (Inputs, y) what stands
    between the projections.
    """

    def __init__(self, op: str, d_model: int, length: int):
        module = nnx.eval_shape(lambda: Mamba2(d_model, Mamba2Config(), rngs=nnx.Rngs(0)))
        self.graph, state = nnx.split(module)
        self.state = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), state)
        self.x = jax.ShapeDtypeStruct((1, length, d_model), jnp.bfloat16)
        self.run, self.form = OPS[op], module.form(length)
        inputs, _ = jax.eval_shape(self.project, self.state, self.x, None)
        self.between = inputs, inputs.x

    def project(self, state, x, y):
        """The projections alone: before the op of x, behind it of y (None: only before)."""
        layer = nnx.merge(self.graph, state)
        inputs = Inputs(layer.in_z(x), layer.in_x(x), layer.in_B(x), layer.in_C(x), layer.in_dt(x))
        return inputs, None if y is None else layer.out(y)

    def op(self, inputs, weights):
        return self.run(inputs, weights, self.form)[0]

    def whole(self, state, x):
        inputs, _ = self.project(state, x, None)
        layer = nnx.merge(self.graph, state)
        return layer.out(self.op(inputs, layer.weights()))

    def programs(self, train: bool) -> Iterator[tuple[str, Callable, tuple]]:
        """(name, function, arguments) of the three programs, with their gradients if ``train``."""
        inputs, y = self.between
        weights = jax.eval_shape(lambda s: nnx.merge(self.graph, s).weights(), self.state)
        for name, function, args, cotangents in (
            ("layer", self.whole, (self.state, self.x), self.x),
            ("projections", self.project, (self.state, self.x, y), (inputs, self.x)),
            ("op alone", self.op, (inputs, weights), y),
        ):
            yield name, *(with_gradient(function, args, cotangents) if train else (function, args))


def with_gradient(function: Callable, args: tuple, cotangents: Any) -> tuple[Callable, tuple]:
    def both(cotangents, *args):
        y, vjp = jax.vjp(function, *args)
        return y, vjp(cotangents)

    return both, (cotangents, *args)


def moved(chip: str, function: Callable, args: tuple, *, any_layout: bool = False) -> int:
    """Bytes of the program compiled for ``chip``."""
    text = aot.compile_for(chip, function, *args, any_layout=any_layout).as_text()
    assert text is not None
    return sum(row.bytes for row in hlo_bytes.count(function, text, *args))


def count(chip: str, op: str, train: bool, d_model: int = D_MODEL, length: int = LENGTH) -> dict[str, int]:
    """Bytes of the "layer", its "projections", and the "op alone"."""
    programs = Layer(op, d_model, length).programs(train)
    return {name: moved(chip, f, args, any_layout=name == "op alone") for name, f, args in programs}


def main(chip: str = "v5e") -> None:
    print(f"Mamba-2 of 2.7B, B=1 L={LENGTH} H=80 P=64 N=128 G=1 bf16, {chip}: MB")
    print(
        f"  {'':20} {'':22} {'layer':>8} {'projections':>12} {'op: layer less projections':>28} {'alone':>8}"
    )
    for train in (False, True):
        for op in OPS:
            size = {name: n / 1e6 for name, n in count(chip, op, train).items()}
            share = size["layer"] - size["projections"]
            print(
                f"  {'forward + backward' if train else 'forward':20} {op:22} {size['layer']:8.0f} "
                f"{size['projections']:12.0f} {share:28.0f} {size['op alone']:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])

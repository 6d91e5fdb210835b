"""The selective scan on TPU, forward: a block's channels walk its tokens with their state in registers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic, planes
from pallas_kernels.mosaic import LANES, SUBLANES
from pallas_kernels.planes import Planes
from pallas_kernels.selective_scan import tpu_plan
from pallas_kernels.selective_scan.tpu_plan import Plan, Specs

Refs = dict[str, Any]  # of each name, a list; under "spread" a dict of them


class Reader:
    """What a kernel reads of a tile, for the channels ``lanes``."""

    def __init__(self, plan: Plan, refs: Refs, lanes: slice | pl.Slice, start: jax.Array):
        self.plan, self.refs, self.lanes, self.start = plan, refs, lanes, start
        self.A = tuple(ref[:, lanes] for ref in refs["A"])
        self.exponents = tpu_plan.exponents(self.A)

    def tokens(self, name: str, tile: jax.Array) -> jax.Array:
        """[8, W] in float32; zero beyond the sequence."""
        (ref,) = self.refs[name]
        rows = ref[tpu_plan.tile_rows(tile), self.lanes].astype(jnp.float32)
        if self.plan.length % self.plan.sizes.tokens == 0:
            return rows
        position = self.start + tile * SUBLANES + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        return jnp.where(position < self.plan.length, rows, 0.0)

    def vector(self, name: str, tile: jax.Array, t: int) -> Planes:
        """B or C [N, W] of token ``t`` of a tile."""
        if name not in self.refs["spread"]:
            return tuple(ref[:, self.lanes] for ref in self.refs[name])
        width, states = self.plan.sizes.lanes, self.plan.d_state
        refs = self.refs["spread"][name]
        return tuple(tpu_plan.spread_column(ref, states, tile, t, width) for ref in refs)

    def kept(self, state: Planes, tile: jax.Array, t: int) -> Planes:
        """Zero in place of a state that token ``t`` of a tile resets."""
        if not self.plan.packed:
            return state
        (ref,) = self.refs["spread"]["keep"]
        keep = tpu_plan.spread_column(ref, SUBLANES, tile, t, self.plan.sizes.lanes)
        keep = jnp.concatenate([keep] * (self.plan.d_state // SUBLANES), axis=0) > 0
        return planes.each(lambda plane: jnp.where(keep, plane, 0.0), state)


def step(h: Planes, dt: jax.Array, u: jax.Array, B: Planes, exponents: Planes) -> Planes:
    """The state after a token of dt and u [1, W]."""
    return add_real(planes.multiply(tpu_plan.decay(dt, exponents), h), planes.multiply(B, (u,)))


def add_real(x: Planes, y: Planes) -> Planes:
    """The sum, where ``y`` may be real though ``x`` is complex."""
    return planes.add(x[: len(y)], y) + x[len(y) :]


def _kernel(*given, plan: Plan, names: tuple[str, ...]):
    refs = group(names, given)
    time = pl.program_id(2)

    @pl.when(time == 0)
    def _():
        for carry, start in zip(refs["h"], refs["state"], strict=True):
            carry[...] = start[...]

    for saved, carry in zip(refs["states"], refs["h"], strict=True):
        saved[...] = carry[...]
    (y_ref,) = refs["y"]
    spread_inputs(plan, refs, plan.tiles(time))

    def chunk(_, lanes):
        read = Reader(plan, refs, lanes, time * plan.sizes.tokens)

        def tile(i, h):
            dt = read.tokens("dt", i)
            u = dt * read.tokens("x", i)
            for t in range(SUBLANES):
                row = slice(t, t + 1)
                h = step(read.kept(h, i, t), dt[row], u[row], read.vector("B", i, t), read.exponents)
                tpu_plan.keep_sums(planes.multiply(h, read.vector("C", i, t))[0], refs["sums"], t)
            y = tpu_plan.summed(refs["sums"], plan.sizes.lanes)
            y_ref[tpu_plan.tile_rows(i), lanes] = 2 * y if plan.A == 2 else y
            return h

        h = tuple(ref[:, lanes] for ref in refs["h"])
        h = jax.lax.fori_loop(0, plan.tiles(time), tile, h)
        for ref, plane in zip(refs["h"], h, strict=True):
            ref[:, lanes] = plane

    plan.each_chunk(chunk)

    @pl.when(time == plan.time_blocks - 1)
    def _():
        for final, carry in zip(refs["final"], refs["h"], strict=True):
            final[...] = carry[...]


def spread_inputs(plan: Plan, refs: Refs, tiles) -> None:
    """Leave in refs["spread"] what tokens have N of, in lanes."""
    refs["spread"] = {name: refs[f"spread {name}"] for name in ("B", "C", "keep") if f"spread {name}" in refs}
    tpu_plan.spread([pair for name, to in refs["spread"].items() for pair in zip(refs[name], to)], tiles)


def spread_scratch(plan: Plan) -> list:
    """Name and shape of the buffers that :func:`spread_inputs` fills."""
    tokens = plan.sizes.tokens
    scratch = []
    if plan.B_by_token:
        scratch += [("spread B", (tokens * plan.d_state, LANES))] * plan.B
    if plan.C_by_token:
        scratch += [("spread C", (tokens * plan.d_state, LANES))] * plan.C
    if plan.packed:
        scratch += [("spread keep", (tokens * SUBLANES, LANES))]
    return scratch


def group(names: tuple[str, ...], refs) -> Refs:
    """The refs of each name, in order."""
    grouped: Refs = {}
    for name, ref in zip(names, refs, strict=True):
        grouped.setdefault(name, []).append(ref)
    return grouped


def inputs(plan: Plan, specs: Specs, arrays: dict[str, Planes]) -> tuple[list[str], list, list]:
    """Names, blocks and arrays of what both kernels read."""
    kinds = {
        "x": specs.tokens(),
        "dt": specs.tokens(),
        "dy": specs.tokens(),
        "A": specs.constant(),
        "B": specs.columns() if plan.B_by_token else specs.constant(),
        "C": specs.columns() if plan.C_by_token else specs.constant(),
        "state": specs.state(),
        "d_final": specs.state(),
        "states": specs.states(),
        "keep": specs.keep(),
    }
    flat = [(name, kinds[name], plane) for name, number in arrays.items() for plane in number]
    return [n for n, _, _ in flat], [s for _, s, _ in flat], [p for _, _, p in flat]


def forward(plan: Plan, arrays: dict[str, Planes]) -> tuple[jax.Array, Planes, Planes]:
    """y [B, L, E], the state before each block [B, L / T, N, E], the final state [B, N, E]; float32."""
    specs = Specs(plan, lambda t: t)
    names, in_specs, operands = inputs(plan, specs, arrays)
    batch, length, channels = arrays["x"][0].shape
    state = (plan.d_state, channels)
    out: list[tuple[str, pl.BlockSpec, tuple[int, ...]]] = [("y", specs.tokens(), (batch, length, channels))]
    out += [("states", specs.states(), (batch, plan.time_blocks, *state))] * plan.A
    out += [("final", specs.state(), (batch, *state))] * plan.A
    scratch: list[tuple[str, tuple[int, ...]]] = [("h", (plan.d_state, plan.sizes.channels))] * plan.A
    scratch += spread_scratch(plan)
    scratch += [("sums", tpu_plan.SUMS)] * pl.cdiv(plan.sizes.lanes, LANES)
    names += [name for name, _, _ in out] + [name for name, _ in scratch]
    results = mosaic.tpu_call(
        functools.partial(_kernel, plan=plan, names=tuple(names)),
        name="selective_scan",
        grid=plan.grid,
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=in_specs,
        out_specs=[spec for _, spec, _ in out],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for _, _, shape in out],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for _, shape in scratch],
        vmem_limit_bytes=plan.vmem_bytes + tpu_plan.SPILLS,
        interpret=plan.interpret,
    )(*operands)
    return results[0], tuple(results[1 : 1 + plan.A]), tuple(results[1 + plan.A :])

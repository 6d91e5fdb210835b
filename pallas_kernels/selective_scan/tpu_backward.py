"""The selective scan on TPU, backward: blocks from the last to the first, each walked forward and back.

Forward again, from the saved state before the block, to have the state before every token in VMEM; then back.
With g_t what the loss gains from h_t and d_t = exp(dt_t A),

    g_t = C_t dy_t + d_{t+1} g_{t+1},   dC_t = h_t dy_t,   dB_t = g_t u_t,   du_t = g_t . B_t,
    q_t = d_t g_t h_{t-1},   d(dt)_t = q_t . A + du_t x_t,   dA = sum_t q_t dt_t,   dx_t = du_t dt_t.

What channels share (dB, dC) is summed over a block's channels here and over blocks by XLA; dA over the tokens
of a row here, over rows by XLA. Complex numbers follow JAX's convention: nothing is conjugated.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic, planes
from pallas_kernels.mosaic import LANES, SUBLANES
from pallas_kernels.planes import Planes
from pallas_kernels.selective_scan import tpu_plan
from pallas_kernels.selective_scan.tpu_forward import (
    Reader,
    add_real,
    group,
    inputs,
    spread_inputs,
    spread_scratch,
    step,
)
from pallas_kernels.selective_scan.tpu_plan import Plan, Specs

Gains = dict[str, Planes]


def _kernel(*given, plan: Plan, names: tuple[str, ...]):
    refs = group(names, given)
    time = plan.time_blocks - 1 - pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        for carry, start in zip(refs["g"], refs["d_final"], strict=True):
            carry[...] = start[...]
        for ref in (ref for name in plan.constant() for ref in refs[f"d{name}"]):
            ref[...] = jnp.zeros_like(ref)

    tiles = plan.tiles(time)
    spread_inputs(plan, refs, tiles)

    def chunk(number, lanes):
        read = Reader(plan, refs, lanes, time * plan.sizes.tokens)
        _walk_forward(read, tiles)
        _walk_back(read, tiles, number == 0)

    plan.each_chunk(chunk)

    @pl.when(time == 0)
    def _():
        for first, carry in zip(refs["d_state"], refs["g"], strict=True):
            first[...] = carry[...]


def _states(refs, plan: Plan, token: jax.Array) -> Planes:
    """The state before a token of the block."""
    rows = _state_rows(plan, token)
    return tuple(ref[rows, :] for ref in refs)


def _state_rows(plan: Plan, token: jax.Array) -> slice | pl.Slice:
    return pl.ds(pl.multiple_of(token * plan.d_state, SUBLANES), plan.d_state)


def _walk_forward(read: Reader, tiles) -> None:
    """Fill "h" with the state before each token, and after the last."""
    plan, h_refs = read.plan, read.refs["h"]

    def keep(h: Planes, token: jax.Array) -> None:
        for ref, plane in zip(h_refs, h, strict=True):
            ref[_state_rows(plan, token), :] = plane

    def tile(i, h):
        dt = read.tokens("dt", i)
        u = dt * read.tokens("x", i)
        for t in range(SUBLANES):
            keep(h, i * SUBLANES + t)
            row = slice(t, t + 1)
            h = step(read.kept(h, i, t), dt[row], u[row], read.vector("B", i, t), read.exponents)
        return h

    h = tuple(ref[:, read.lanes] for ref in read.refs["states"])
    keep(jax.lax.fori_loop(0, tiles, tile, h), jnp.int32(tiles * SUBLANES))


def _walk_back(read: Reader, tiles, first: jax.Array) -> None:
    """Gains of everything, from the last token to the first."""
    plan, refs, lanes = read.plan, read.refs, read.lanes

    def tile(i, carry):
        i = tiles - 1 - i
        dt, x, dy = (read.tokens(name, i) for name in ("dt", "x", "dy"))
        u, dy = dt * x, 2 * dy if plan.A == 2 else dy
        g, summed = carry["g"], {name: carry[name] for name in plan.constant()}
        columns: dict[str, list[Planes]] = {name: [] for name in plan.by_token()}
        for t in reversed(range(SUBLANES)):
            row = slice(t, t + 1)
            g, gains = _token(read, i, t, g, dt[row], u[row], dy[row])
            summed = {name: planes.add(total, gains[name]) for name, total in summed.items()}
            for name, found in columns.items():
                found.insert(0, planes.each(tpu_plan.sum_lanes, gains[name]))
        for name, found in columns.items():
            _write_columns(refs[f"d{name}"], i, found, first)
        du, d_dt = (tpu_plan.summed(refs[name], plan.sizes.lanes) for name in ("du sums", "dt sums"))
        rows = tpu_plan.tile_rows(i)
        (dx_ref,), (d_dt_ref,) = refs["dx"], refs["ddt"]
        dx_ref[rows, lanes] = (du * dt).astype(dx_ref.dtype)
        d_dt_ref[rows, lanes] = d_dt + du * x
        return {"g": g, **summed}

    carry: Gains = {"g": tuple(ref[:, lanes] for ref in refs["g"])}
    carry |= {name: tuple(ref[:, lanes] for ref in refs[f"d{name}"]) for name in plan.constant()}
    carry = jax.lax.fori_loop(0, tiles, tile, carry)
    for name, gain in carry.items():
        for ref, plane in zip(refs["g" if name == "g" else f"d{name}"], gain, strict=True):
            ref[:, lanes] = plane


def _token(read: Reader, tile, t: int, g: Planes, dt, u, dy) -> tuple[Planes, Gains]:
    """What the loss gains from the state before token ``t`` of a tile, and from A, B and C there, [N, W].

    ``g``: what it gains from the state after the token by later ones. dt, u, dy: [1, W].
    """
    plan, refs, token = read.plan, read.refs, tile * SUBLANES + t
    B, C = read.vector("B", tile, t), read.vector("C", tile, t)
    after = _states(refs["h"], plan, token + 1)
    before = read.kept(_states(refs["h"], plan, token), tile, t)
    g = add_real(g, planes.multiply(C, (dy,)))
    tpu_plan.keep_sums(planes.multiply(g, B)[0], refs["du sums"], t)
    decayed = planes.multiply(g, tpu_plan.decay(dt, read.exponents))
    q = planes.multiply(decayed, before)
    tpu_plan.keep_sums(planes.multiply(q, read.A)[0], refs["dt sums"], t)
    return read.kept(decayed, tile, t), {
        "A": planes.multiply(q, (dt,)),
        "B": planes.multiply(g, (u,))[: plan.B],
        "C": planes.multiply(after, (dy,))[: plan.C],
    }


def _write_columns(refs, tile: jax.Array, columns: list[Planes], first: jax.Array) -> None:
    """Add, or of the ``first`` channels of a block put, the columns of a tile's tokens into [N, T]."""
    lanes, start = tpu_plan.strip(tile)
    for ref, plane in zip(refs, zip(*columns, strict=True), strict=True):
        found = ref[:, lanes]
        lane = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
        earlier = jnp.where(first, 0.0, found)
        for t, column in enumerate(plane):
            found = jnp.where(lane == start + t, earlier + column, found)
        ref[:, lanes] = found


def backward(plan: Plan, arrays: dict[str, Planes]) -> dict[str, Planes]:
    """Gains "dx", "ddt" [B, L, E]; "dA" [B, N, E]; "dB", "dC" [B, E / W, N, L] or, constant, [B, N, E];
    "d_state" [B, N, E]."""
    specs = Specs(plan, lambda t: plan.time_blocks - 1 - t)
    names, in_specs, operands = inputs(plan, specs, arrays)
    (x,), f32 = arrays["x"], jnp.float32
    state = (plan.batch, plan.d_state, x.shape[2])
    columns = (plan.batch, plan.grid[1], plan.d_state, plan.time_blocks * plan.sizes.tokens)
    out = [("dx", specs.tokens(), x.shape, x.dtype), ("ddt", specs.tokens(), x.shape, f32)]
    for name, count in (("A", plan.A), ("B", plan.B), ("C", plan.C)):
        kind = (specs.columns_of_block(), columns) if name in plan.by_token() else (specs.state(), state)
        out += [(f"d{name}", *kind, f32)] * count
    out += [("d_state", specs.state(), state, f32)] * plan.A
    sizes = plan.sizes
    scratch = [("g", (plan.d_state, sizes.channels))] * plan.A
    scratch += [("h", ((sizes.tokens + 1) * plan.d_state, sizes.lanes))] * plan.A
    scratch += spread_scratch(plan)
    lane_tiles = pl.cdiv(sizes.lanes, LANES)
    scratch += [("du sums", tpu_plan.SUMS)] * lane_tiles + [("dt sums", tpu_plan.SUMS)] * lane_tiles
    names += [name for name, *_ in out] + [name for name, _ in scratch]
    results = mosaic.tpu_call(
        functools.partial(_kernel, plan=plan, names=tuple(names)),
        name="selective_scan_backward",
        grid=plan.grid,
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=in_specs,
        out_specs=[spec for _, spec, *_ in out],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for *_, shape, dtype in out],
        scratch_shapes=[pltpu.VMEM(shape, f32) for _, shape in scratch],
        vmem_limit_bytes=plan.vmem_bytes + tpu_plan.SPILLS,
        interpret=plan.interpret,
    )(*operands)
    return {name: tuple(found) for name, found in group(tuple(n for n, *_ in out), results).items()}

"""SSD as Pallas kernels for TPU: layouts, padding and the rule of differentiation around them.

The public layout [B, L, H, P] becomes the kernels' [B, H*P, L] by a transposition that XLA absorbs into the
layouts of the matrix products around the op. For the backward the forward saves the state at the start of
every chunk, in the operands' dtype: its products would round them to that anyway, and of bfloat16 operands
this is a quarter instead of half of what the forward moves (Q = N = 128).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic, tuning
from pallas_kernels.dispatch import unsuitable
from pallas_kernels.ssd import xla
from pallas_kernels.ssd.tpu_backward import backward
from pallas_kernels.ssd.tpu_chunk import Plan
from pallas_kernels.ssd.tpu_forward import forward
from pallas_kernels.ssd.unfused import unfused

# What a grid step holds in fast memory grows with K P (N + Q): at most this by choice, and half as much again
# where one head alone needs it.
STEP_SIZE = 40 * 64 * (128 + 128)
MAX_CHUNK = 512
OPERANDS = (jnp.float32, jnp.bfloat16)


def ssd(
    x: Float[Array, "B L H P"],
    scale: Float[Array, "B L H"] | None,
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, " H"] | None,
    state: Float[Array, "B H P N"],
    runs: Int[Array, "B L"] | None,
    chunk_size: int | None,
    *,
    interpret: mosaic.Interpret = False,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """The contract of ``ssd/unfused.py``, for calls that :func:`unsupported` takes; one token is XLA's."""
    batch, length, heads, headdim = x.shape
    if length == 1:
        return unfused(xla.ssd_core)(x, scale, log_decay, B, C, D, state, runs, chunk_size)
    operand = jnp.result_type(x, B, C)
    scale = jnp.ones_like(log_decay) if scale is None else scale
    D = jnp.zeros(heads) if D is None else D
    # Below the smallest normal number a decay is zero; the bound keeps cumulative sums precise behind such
    # a token.
    log_decay = jnp.maximum(log_decay, jnp.log(jnp.finfo(jnp.float32).tiny))
    plan = make_plan(x.shape, B.shape, operand, runs is not None, chunk_size, interpret)

    tokens, channels = plan.chunks * plan.chunk - length, plan.headdim - headdim
    x_rows = pad(x.astype(operand), {1: tokens, 3: channels})
    x_rows = x_rows.reshape(*x_rows.shape[:2], -1).swapaxes(1, 2)
    scale, log_decay = (pad(t, {1: tokens}).swapaxes(1, 2) for t in (scale, log_decay))
    B, C = (to_groups(plan, pad(t.astype(operand), {1: tokens})) for t in (B, C))
    rows = pad(state, {2: channels}).reshape(batch, -1, plan.d_state)
    counts = None if runs is None else chunk_counts(pad(runs, {1: tokens}, mode="edge"), plan.chunk)

    y, rows = _scan(plan, x_rows, scale, log_decay, B, C, D.astype(jnp.float32), rows, counts)
    y = y.swapaxes(1, 2)[:, :length].reshape(batch, length, heads, -1)[..., :headdim]
    return y.astype(x.dtype), rows.reshape(batch, heads, -1, plan.d_state)[:, :, :headdim]


def unsupported(
    x, scale, log_decay, B, C, D, state, runs, chunk_size, *, interpret: bool = False
) -> str | None:
    """Why the kernels cannot take the call, or None. Only the chip wants chunks of whole tiles of lanes."""
    if reason := unsuitable({"x": x, "B": B, "C": C}, *OPERANDS):
        return reason
    if reason := unsuitable({"the state": state}, jnp.float32, advice="give dt and A in float32"):
        return reason
    if interpret:
        return None
    chunk = min(chunk_size or mosaic.LANES, x.shape[1])
    if chunk > MAX_CHUNK:
        return f"chunk_size = {chunk_size} is above {MAX_CHUNK}, what fast memory holds; use 128 or None"
    if chunk < x.shape[1] and chunk % mosaic.LANES:
        return f"chunk_size = {chunk_size} is not a multiple of {mosaic.LANES} lanes; use 128 or None"
    headdim, d_state = state.shape[2:]
    if headdim * (d_state + chunk) > 1.5 * STEP_SIZE:
        return (
            f"a head of P = {headdim} channels and N = {d_state} states fills fast memory; split P into heads"
        )
    return None


def default_blocks(heads_per_group: int, headdim: int, d_state: int, chunk: int) -> dict[str, int]:
    """Chunk and heads a grid step: as many heads as ``STEP_SIZE`` allows."""
    heads = largest_divisor(heads_per_group, STEP_SIZE // (headdim * (d_state + chunk)))
    return {"chunk": chunk, "heads": heads, "heads_backward": heads}


def largest_divisor(n: int, at_most: int) -> int:
    """Of ``n``, at most ``at_most`` and at least 1."""
    return next((k for k in range(min(n, at_most), 0, -1) if n % k == 0), 1)


def make_plan(
    x: tuple[int, ...], B: tuple[int, ...], operand, packed: bool, chunk_size: int | None, interpret
) -> Plan:
    """From the shapes [B, L, H, P] of x and [B, L, G, N] of B; blocks from the tuning table."""
    batch, length, heads, headdim = x
    groups, d_state = B[2:]
    headdim += -headdim % mosaic.SUBLANES
    shape = {"B": batch, "L": length, "H": heads, "P": headdim, "N": d_state, "G": groups}
    default = default_blocks(heads // groups, headdim, d_state, chunk_size or mosaic.LANES)
    blocks = tuning.blocks("ssd", shape, operand, default)
    tile = 1 if interpret else mosaic.LANES
    chunk = min(chunk_size or blocks["chunk"], length + -length % tile)
    chunk += -chunk % tile
    return Plan(
        batch=batch,
        chunks=-(-length // chunk),
        heads=heads,
        headdim=headdim,
        groups=groups,
        d_state=d_state,
        chunk=chunk,
        block=largest_divisor(heads // groups, blocks["heads"]),
        backward_block=largest_divisor(heads // groups, blocks["heads_backward"]),
        packed=packed,
        interpret=interpret,
    )


def pad(t: jax.Array, after: dict[int, int], **mode) -> jax.Array:
    """Zeros after the end of the axes in ``after``."""
    if not any(after.values()):
        return t
    return jnp.pad(t, [(0, after.get(axis, 0)) for axis in range(t.ndim)], **mode)


def to_groups(plan: Plan, t: jax.Array) -> jax.Array:
    """[B, L, G, N] -> [B, 1, L, G*N] or [B, G, L, N]."""
    if plan.flat_groups:
        return t.reshape(t.shape[0], 1, t.shape[1], -1)
    return t.swapaxes(1, 2)


def chunk_counts(runs: jax.Array, chunk: int) -> jax.Array:
    """Resets so far in each chunk, [B, 1, L]; run 0 continues the initial state."""
    before = jnp.pad(runs[:, chunk - 1 : -1 : chunk], [(0, 0), (1, 0)])
    return (runs - jnp.repeat(before, chunk, axis=1))[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(plan, x, scale, log_decay, B, C, D, state, counts):
    y, final, _ = forward(plan, x, scale, log_decay, B, C, D, state, counts, save=False)
    return y, final


def _scan_forward(plan, x, scale, log_decay, B, C, D, state, counts):
    y, final, starts = forward(plan, x, scale, log_decay, B, C, D, state, counts, save=True)
    return (y, final), (x, scale, log_decay, B, C, D, starts, final, counts)


def _scan_backward(plan, residuals, cotangents):
    x, scale, log_decay, B, C, D, starts, final, counts = residuals
    dy, d_final = cotangents
    overlap = jnp.sum((d_final * final).reshape(plan.batch, plan.heads, -1), axis=-1)
    gradients = backward(plan, x, scale, log_decay, B, C, D, starts, counts, dy, d_final, overlap)
    return (*gradients, None)


_scan.defvjp(_scan_forward, _scan_backward)

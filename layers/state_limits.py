"""SSD whose state is kept small: exact sliding window, capped norm (Stuffed Mamba, arXiv:2410.07145)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.types import State
from pallas_kernels.segments import reset_runs
from pallas_kernels.ssd import ssd_core


def empty_window(batch: int, window: int, heads: int, headdim: int, groups: int, d_state: int) -> State:
    """What :func:`windowed_ssd` carries beside the state S: S as it was ``window`` tokens ago, and since then
    u, B and log decays of the tokens; entries that hold none (``real`` is False) are zero."""
    recent = {
        "u": jnp.zeros((batch, window, heads, headdim)),
        "B": jnp.zeros((batch, window, groups, d_state)),
        "log_decay": jnp.zeros((batch, window, heads)),
        "real": jnp.zeros((batch, window), bool),
    }
    return {"behind": jnp.zeros((batch, heads, headdim, d_state)), "recent": recent}


def windowed_ssd(
    u: Float[Array, "B L H P"],
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    window: int,
    *,
    initial_state: Float[Array, "B H P N"] | None = None,
    carried: State | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"], State]:
    """y_t = (S_t - exp(sum of the last r log decays) S_{t-r}) C_t: what the last r = ``window`` tokens wrote.

    S itself goes on as without a window. The second term is an SSD too, of the inputs of r tokens ago read
    with C of now, so two chunked scans do it. r counts real tokens of the own segment.

    Args:
        u, log_decay, B, C, initial_state: as for ``ssd_core``.
        carried: of the piece before, or :func:`empty_window`; None for nothing before.
        segment_ids: canonical ids (``layers.types.Context``), 0 for padding.
        options: ``chunk_size`` and ``implementation`` of ``ssd_core``.

    Returns:
        y in the dtype of ``u``, the state S after the last token, and what to carry on.
    """
    batch, length, heads, headdim = u.shape
    if carried is None:
        carried = empty_window(batch, window, heads, headdim, *B.shape[2:])
    y, state = ssd_core(u, log_decay, B, C, initial_state=initial_state, segment_ids=segment_ids, **options)

    recent, ids, order = carried["recent"], jnp.ones((batch, length), jnp.int32), None
    if segment_ids is not None:
        ids, log_decay = segment_ids, jnp.where((segment_ids != 0)[..., None], log_decay, 0)
    piece = {"u": u, "B": B, "log_decay": log_decay}
    line = {k: jnp.concatenate([recent[k].astype(t.dtype), t], axis=1) for k, t in piece.items()}
    ids = jnp.concatenate([recent["real"].astype(jnp.int32), ids], axis=1)
    if segment_ids is not None:  # real tokens to the end of the line, so that r places are r tokens
        order = jnp.argsort(ids != 0, axis=1, stable=True)
        line, ids = {k: take(t, order) for k, t in line.items()}, take(ids, order)
        C = take(jnp.pad(C, ((0, 0), (window, 0), (0, 0), (0, 0))), order)[:, window:]
    left_out, behind = ssd_core(
        line["u"][:, :length],
        line["log_decay"][:, :length],
        line["B"][:, :length],
        C,
        initial_state=carried["behind"].astype(state.dtype),
        segment_ids=None if segment_ids is None else ids[:, :length],
        **options,
    )
    decay = jnp.exp(window_sums(line["log_decay"], window)[:, window:])
    left_out = (decay[..., None] * left_out).astype(y.dtype)
    if segment_ids is not None and order is not None:
        left_out = _where(ids[:, :length] == ids[:, window:], left_out)
        place = jnp.argsort(order, axis=1)[:, window:] - window
        left_out = _where(segment_ids != 0, take(left_out, jnp.maximum(place, 0)))

    last = jnp.maximum(ids[:, -1], 1)  # nothing of an earlier segment is needed again
    behind = jnp.where((jnp.maximum(ids[:, length - 1], 1) == last)[:, None, None, None], behind, 0)
    real = (ids[:, length:] == last[:, None]) & (ids[:, length:] != 0)
    kept = {k: _where(real, t[:, length:]) for k, t in line.items()}
    return y - left_out, state, {"behind": behind, "recent": {**kept, "real": real}}


def window_sums(a: Float[Array, "B L H"], window: int) -> Float[Array, "B L H"]:
    """Sums over the last ``window`` entries, zero before the first.

    Of sums over powers of two, not differences of cumulative sums, which lose their digits with the length.
    """

    def delayed(t: Array, by: int) -> Array:
        return jnp.pad(t, ((0, 0), (by, 0), (0, 0)))[:, : t.shape[1]]

    total, taken, block, size = jnp.zeros_like(a), 0, a, 1
    while taken < window:
        if window & size:
            total, taken = total + delayed(block, taken), taken + size
        block, size = block + delayed(block, size), 2 * size
    return total


def capped_ssd(
    u: Float[Array, "B L H P"],
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    cap: Float[Array, " H"],
    *,
    initial_state: Float[Array, "B H P N"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"], Float[Array, "B L H"]]:
    """SSD with S scaled down to the Frobenius norm ``cap`` of its head after every token that exceeds it.

    Not linear in S, so one token at a time.

    Returns:
        y in the dtype of ``u``, zero at padding; the last S; the squared norms before scaling [B, L, H].
    """
    batch, _, heads, headdim = u.shape
    dtype = jnp.promote_types(u.dtype, log_decay.dtype)
    state = jnp.zeros((batch, heads, headdim, B.shape[3])) if initial_state is None else initial_state
    reset = jnp.zeros(u.shape[:2], bool)
    real = jnp.ones(u.shape[:2], bool)
    if segment_ids is not None:
        reset, real = jnp.diff(reset_runs(segment_ids), axis=1, prepend=0) != 0, segment_ids != 0

    def step(S: Array, token: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        u, a, B, C, reset, real = token
        after = jnp.where(reset[:, None, None, None], 0, S)
        after = jnp.exp(a)[..., None, None] * after + u[..., None] * B[:, :, None]
        square = jnp.sum(jnp.square(after), axis=(2, 3))
        over = square > jnp.square(cap)
        factor = jnp.where(over, cap, 1) * jax.lax.rsqrt(jnp.where(over, square, 1))
        after = jnp.where(real[:, None, None, None], factor[..., None, None] * after, S)
        return after, (jnp.einsum("bhpn,bhn->bhp", after, C), square)

    B, C = (jnp.repeat(t, heads // t.shape[2], axis=2) for t in (B, C))
    tokens = (*(t.astype(dtype) for t in (u, log_decay, B, C)), reset, real)
    by_time = jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), tokens)
    final, (y, squares) = jax.lax.scan(step, state.astype(dtype), by_time)
    y, squares = (_where(real, jnp.moveaxis(t, 0, 1)) for t in (y, squares))
    return y.astype(u.dtype), final, squares


def take(t: Array, places: Int[Array, "B K"]) -> Array:
    """``t`` [B, L, ...] at ``places`` of each row: [B, K, ...]."""
    return jnp.take_along_axis(t, places.reshape(*places.shape, *[1] * (t.ndim - 2)), axis=1)


def _where(real: Bool[Array, "B L"], t: Array) -> Array:
    return jnp.where(real.reshape(*real.shape, *[1] * (t.ndim - 2)), t, 0)

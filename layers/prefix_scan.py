"""A prefix read both ways by a recurrence, what follows it causally (Birdie, arXiv:2411.01030)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.segments import reset_runs
from pallas_kernels.ssd import ssd_core


def prefix_ssd(
    u: Float[Array, "B L H P"],
    log_decay: Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    prefix: Bool[Array, "B L"],
    *,
    initial_state: Float[Array, "B H P N"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """SSD of which the second half of the heads runs backward, S_t = exp(log_decay_t) S_{t+1} + u_t B_t^T.

    Where ``prefix`` is False the backward decay is 0: such a token is all that its state holds, and what
    follows is not seen before it. So the prefix reads one token more than itself, the first after it: safe
    where this is always the same (a "begin" token), as published. A prefix must lie in one piece, and at the
    start of its segment; the backward half carries no state.

    Args:
        segment_ids: canonical ids; both directions start afresh in each segment.
        options: ``chunk_size`` and ``implementation`` of ``ssd_core``.

    Returns:
        y; the final state, zero for the heads that run backward.

    Raises:
        ValueError: the heads, or several groups, do not split in two.
    """
    heads, groups = u.shape[2], B.shape[2]
    if heads % 2 or (groups > 1 and groups % 2):
        raise ValueError(
            f"bidirectional_prefix: {heads} heads in {groups} groups do not split in two halves; "
            "use an even number of heads, and one group or an even number"
        )
    half = heads // 2
    (B_fwd, B_bwd), (C_fwd, C_bwd) = (jnp.split(t, 2, axis=2) if groups > 1 else (t, t) for t in (B, C))
    before = None if initial_state is None else initial_state[:, :half]
    forward, state = ssd_core(
        u[:, :, :half],
        log_decay[:, :, :half],
        B_fwd,
        C_fwd,
        initial_state=before,
        segment_ids=segment_ids,
        **options,
    )
    # A closed forget gate is a new segment: what the state held is gone to the bit.
    runs = jnp.cumsum(jnp.flip(~prefix, 1), axis=1, dtype=jnp.int32) + 1
    if segment_ids is not None:
        reversed_ids = jnp.flip(segment_ids, 1)
        runs = jnp.where(reversed_ids != 0, runs + reset_runs(reversed_ids), 0)
    inputs = (jnp.flip(t, 1) for t in (u[:, :, half:], log_decay[:, :, half:], B_bwd, C_bwd))
    backward, _ = ssd_core(*inputs, segment_ids=runs, **options)
    y = jnp.concatenate([forward, jnp.flip(backward, 1)], axis=2)
    return y, jnp.concatenate([state, jnp.zeros_like(state)], axis=1)

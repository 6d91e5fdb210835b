"""Where beacons stand among raw tokens, which positions all of them have, and what they see.

A piece of L raw tokens becomes L + N slots: the raw tokens, then room for as many beacons as L tokens can
have; beacons there are fewer of are padding. The order of slots in time is not that of the array: it is in
numbers that masks compare. All of it is arithmetic on integers, once for all layers.

In a document, token n is token j = n mod w of window g = n div w; of beacons, m stand before the window, and
i before the token (or beacon) in its window. Before the window lie M = m + sinks memories (none before the
first), so rotary positions are

* interleaved: M + j + i for a raw token and one more for the beacon after it: the slot in the window;
* first version: M + j for a raw token; M + (i + 1) alpha, M + alpha or M + w for beacon i by step-expansion,
  segmentation and full coverage;

and m + i + sinks for the beacon as a memory, seen by later windows only. Since a layer needs only its own
keys of earlier windows, all windows are computed at once: one attention over memories and the own window,
with no recurrence (and no stopped gradient) from window to window.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from layers.beacon_ratios import BeaconConfig, Ratios
from layers.types import Context, positions_in_segments
from pallas_kernels import spmd

NOWHERE = 2**30  # out of bounds of any cache, where writes are dropped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carried:
    """What a document that goes on in this piece left in the caches, int32 [B]; 0 in rows that start anew.

    Attributes:
        window: g of its unfinished window.
        settled: memories of finished windows, and the position at which the unfinished one begins.
        memories: those of the unfinished window included.
        slots: of the unfinished window.
        ratio: alpha of the unfinished window.
    """

    window: Int[Array, " B"]
    settled: Int[Array, " B"]
    memories: Int[Array, " B"]
    slots: Int[Array, " B"]
    ratio: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BeaconContext(Context):
    """Slots of a piece: ``positions`` (rotary) and ``segment_ids`` have S = L + N of them.

    Attributes:
        window: g, [B, S].
        clock: order of slots, [B, S]: two slots of one window differ by less than ``2 w``, two of different
            windows by more.
        chunk: [B, S]: of a beacon, a number of its own in the document; of a raw token, that of the beacon
            its part of the window is condensed into by segmentation.
        memory: position of each beacon as a memory, [B, N].
        memory_slot, window_slot: where a slot is written in the two caches, [B, S], or ``NOWHERE``.
        tokens: raw tokens of the document so far, after the piece, [B].
        cached: what was in the caches before, None without a state.
        raw: L (static).
    """

    window: Int[Array, "B L"]
    clock: Int[Array, "B L"]
    chunk: Int[Array, "B L"]
    memory: Int[Array, "B N"]
    memory_slot: Int[Array, "B L"]
    window_slot: Int[Array, "B L"]
    tokens: Int[Array, " B"]
    cached: Carried | None
    raw: int = dataclasses.field(metadata={"static": True})

    @property
    def is_beacon(self) -> Bool[Array, " S"]:
        """False for the first L slots."""
        return jnp.arange(self.window.shape[1]) >= self.raw


class _Places(NamedTuple):
    """Of raw tokens [B, L] or of beacons [B, N]: what the module docstring calls g, j, i, m and alpha."""

    segment: Array
    window: Array
    token: Array
    order: Array
    before: Array
    ratio: Array


def room(config: BeaconConfig, smallest: int, length: int, *, aligned: bool, last: bool) -> int:
    """Beacons that ``length`` tokens can have at ratios of at least ``smallest``.

    Args:
        aligned: documents begin in the piece; else it may begin in the middle of a window.
        last: whether the last window of a document has beacons too.
    """
    whole = length // config.window if aligned else -(-length // config.window)
    if not last:
        return (length - 1) // config.window * (config.window // smallest)
    if config.variant == "full-coverage":
        return whole * (config.window // smallest)
    return length // smallest if aligned else -(-length // smallest)


def lay_out(
    config: BeaconConfig, ratios: Ratios, ctx: Context, before: Int[Array, " B"] | None, *, last: bool
) -> BeaconContext | None:
    """The slots of a piece whose raw tokens ``ctx`` describes; None if they can have no beacon at all.

    Args:
        ratios: by window.
        before: raw tokens of the carried document so far; None without a state.
        last: as for :func:`room`. In the first version nobody sees those, so without a state there are none.
    """
    batch, length = ctx.positions.shape
    last = last and (config.interleaved or before is not None)
    count = room(config, ratios.smallest, length, aligned=before is None, last=last)
    if before is None and count == 0:
        return None
    parts = spmd.sequence_parts()
    count += -count % parts if length % parts == 0 else 0
    start = jnp.zeros(batch, jnp.int32) if before is None else before
    if ctx.continues is not None:
        start = jnp.where(ctx.continues, start, 0)

    raw, emitted = _raw_places(config, ratios, ctx, start, last)
    beacons = _beacon_places(config, raw, emitted, count)
    both = _Places(*(jnp.concatenate(pair, axis=1) for pair in zip(raw, beacons)))
    is_beacon = (jnp.arange(length + count) >= length).astype(jnp.int32)
    slot = both.token + is_beacon
    if config.interleaved:
        slot += both.order
    elif config.variant == "segmentation":
        slot = jnp.where(is_beacon, both.ratio, slot)
    begin = jnp.where(both.window > 0, config.sinks + both.before, 0)
    memory = config.sinks + beacons.before + beacons.order

    tokens, kept = _kept(both.segment, length, start)
    sink = kept[:, :length] & (raw.window == 0) & (raw.token < config.sinks)
    memory_slot = [jnp.where(sink, raw.token, NOWHERE), jnp.where(kept[:, length:], memory, NOWHERE)]
    unfinished = kept & (both.window == (tokens // config.window)[:, None])
    if not config.interleaved:  # no raw token looks for beacons there
        unfinished &= is_beacon == 0
    return BeaconContext(
        positions=begin + slot,
        segment_ids=both.segment,
        continues=ctx.continues,
        deterministic=ctx.deterministic,
        sequence_axis=ctx.sequence_axis,
        window=both.window,
        clock=both.window * (4 * config.window) + 2 * both.token + is_beacon,
        chunk=both.window * config.window + jnp.where(is_beacon, both.order, both.token // both.ratio),
        memory=memory,
        memory_slot=jnp.concatenate(memory_slot, axis=1),
        window_slot=jnp.where(unfinished, slot, NOWHERE),
        tokens=tokens,
        cached=None if before is None else _carried(config, ratios, start),
        raw=length,
    )


def _raw_places(
    config: BeaconConfig, ratios: Ratios, ctx: Context, start: Int[Array, " B"], last: bool
) -> tuple[_Places, Int[Array, "B L"]]:
    """Places of the raw tokens, and how many beacons follow each."""
    segment = jnp.ones(ctx.positions.shape, jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
    number = positions_in_segments(segment, start - 1)
    window, token = number // config.window, number % config.window
    ratio = ratios.of(window)
    condensed = segment != 0
    if not last:
        condensed &= window < _ends(segment, number) // config.window
    if config.variant == "full-coverage":
        emitted = jnp.where(condensed & (token == config.window - 1), config.window // ratio, 0)
    else:
        emitted = (condensed & ((token + 1) % ratio == 0)).astype(jnp.int32)
    order = jnp.where(condensed, token // ratio, 0)
    return _Places(segment, window, token, order, ratios.before(window), ratio), emitted


def _beacon_places(config: BeaconConfig, raw: _Places, emitted: Int[Array, "B L"], count: int) -> _Places:
    """Places of ``count`` beacons, in order; those that no token emits are padding."""
    upto = jnp.cumsum(emitted, axis=1)
    number = jnp.arange(count)
    owner = jax.vmap(lambda sums: jnp.searchsorted(sums, number, side="right"))(upto)
    owner = jnp.minimum(owner, upto.shape[1] - 1)
    after = _Places(*(jnp.take_along_axis(field, owner, axis=1) for field in raw))
    order = after.order
    if config.variant == "full-coverage":  # several after one token
        order = number - jnp.take_along_axis(upto - emitted, owner, axis=1)
    return after._replace(segment=jnp.where(number < upto[:, -1:], after.segment, 0), order=order)


def _kept(
    segment: Int[Array, "B S"], length: int, start: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Bool[Array, "B S"]]:
    """Raw tokens so far of the document that a piece ends with, and which slots are its own."""
    last = segment[:, :length].max(axis=1)
    own = (segment == last[:, None]) & (segment != 0)
    begun = jnp.where(last > 1, 0, start)
    return begun + own[:, :length].sum(axis=1, dtype=jnp.int32), own


def _ends(segment: Int[Array, "B L"], number: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """``number`` of the last token of each token's segment."""
    length = segment.shape[1]
    following = jnp.concatenate([segment[:, 1:], segment[:, :1] * 0], axis=1)
    index = jnp.where(segment != following, jnp.arange(length), length - 1)
    return jnp.take_along_axis(number, jax.lax.cummin(index, axis=1, reverse=True), axis=1)


def _carried(config: BeaconConfig, ratios: Ratios, start: Int[Array, " B"]) -> Carried:
    """What ``start`` tokens have left in the caches."""
    window, token = start // config.window, start % config.window
    ratio, before = (look_up(window[:, None])[:, 0] for look_up in (ratios.of, ratios.before))
    pending = jnp.zeros_like(start) if config.variant == "full-coverage" else token // ratio
    return Carried(
        window=window,
        settled=jnp.where(window > 0, config.sinks + before, 0),
        memories=jnp.minimum(start, config.sinks) + before + pending,
        slots=token + pending if config.interleaved else token,
        ratio=ratio,
    )

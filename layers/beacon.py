"""Attention over condensed memory: queries of raw tokens and beacons see memories and their own window.

Zhang et al. 2024, arXiv:2401.03462. The slots are laid out by ``beacon_slots.py``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from layers.attention import Attention, AttentionConfig, store
from layers.beacon_ratios import BeaconConfig, beacons_of
from layers.beacon_slots import NOWHERE, BeaconContext
from layers.param import Initializer, Linear, uniform_fan_in
from layers.rope import apply_rope
from layers.types import Context, State
from pallas_kernels.attention import Mask, Source

CAUSAL, SAME = Mask(causal=True), Mask(causal=True, window=1)


class BeaconProjections(nnx.Module):
    """Copies of the projections of an attention layer, for its beacons."""

    def __init__(self, layer: Attention, own_out: bool):
        self.q, self.k, self.v = (nnx.clone(p) for p in (layer.q, layer.k, layer.v))
        self.out: Linear | None = nnx.clone(layer.out) if own_out else None


class BeaconAttention(Attention):
    """An attention layer with projections of its own for beacons: ``beacon.q``, ``k``, ``v`` (and ``out``).

    They start as copies of the layer's. Called with a `BeaconContext` it works on slots [B, L + N, D], raw
    tokens first; with any other, it is the layer without beacons, to the bit.

    State: ``memory`` holds sinks and beacons of the document so far, those of the unfinished window included,
    ``window`` the slots of the unfinished window; each ``k``, ``v`` [B, M, K, E], keys before the rotation,
    for a beacon has one position in its window and another as a memory. Without beacons outside training
    (``plain``) it is that of `Attention`.

    Raises:
        ValueError: a field of the config whose value cannot work.
    """

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig,
        *,
        condensing: BeaconConfig,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        super().__init__(d_model, config, rngs=rngs, init=init, out_init=out_init)
        self.condensing = condensing
        self.beacon = BeaconProjections(self, condensing.own_out)

    def init_state(self, batch: int, max_len: int) -> State:
        """Empty caches with room for the beacons of ``max_len`` tokens, and a window."""
        c = self.condensing
        if c.plain:
            return super().init_state(batch, max_len)
        tokens = min(c.window, max_len)
        beacons = tokens // min(c.evaluated) if c.interleaved else 0
        sizes = {"memory": max(c.sinks + beacons_of(c, max_len), 1), "window": tokens + beacons}

        def empty(slots: int) -> Float[Array, "B M K E"]:
            return jnp.zeros((batch, slots, self.kv_heads, self.head_dim), self.config.cache_dtype)

        return {name: {"k": empty(slots), "v": empty(slots)} for name, slots in sizes.items()}

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        if not isinstance(ctx, BeaconContext):
            return super().__call__(x, state, ctx)
        q, k, v = self._project_slots(x, ctx)
        sources = [*self._memories(k, v, ctx), *self._own_window(k, v, ctx)]
        if state is not None:
            sources += self._in_caches(state, ctx)
        y = self._attend(self._rotate(q, ctx.positions), sources, ctx)
        return self._out(y.reshape(*x.shape[:2], -1), ctx), self._write_slots(state, k, v, ctx)

    def flops_per_token(self, length: int) -> float:
        """Mean over a document of ``length`` tokens at the mean of the training ratios, beacons included."""
        share = self.condensing.share
        window = min(self.condensing.window, length)
        memories = share * (length - window) / 2
        own = (1 + share) * (window + 1) / 2
        widths = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        per_slot = 2.0 * self.d_model * widths + 4.0 * self.heads * self.head_dim * (memories + own)
        return (1 + share) * per_slot

    def _project_slots(self, x: Array, ctx: BeaconContext) -> tuple[Array, Array, Array]:
        """q, k, v [B, S, .., E] before the rotation."""

        def project(own: Linear, beacon: Linear) -> Array:
            parts = [own(x[:, : ctx.raw]), beacon(x[:, ctx.raw :])]
            return jnp.concatenate(parts, axis=1).reshape(*x.shape[:2], -1, self.head_dim)

        b = self.beacon
        q, k, v = (project(*pair) for pair in ((self.q, b.q), (self.k, b.k), (self.v, b.v)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _out(self, y: Float[Array, "B L C"], ctx: BeaconContext) -> Float[Array, "B L D"]:
        if self.beacon.out is None:
            return self.out(y)
        return jnp.concatenate([self.out(y[:, : ctx.raw]), self.beacon.out(y[:, ctx.raw :])], axis=1)

    def _rotate(self, x: Float[Array, "B L H E"], positions: Int[Array, "B L"]) -> Float[Array, "B L H E"]:
        return apply_rope(x, positions, self.config.rope) if self.config.position == "rope" else x

    def _memory_clock(self, ctx: BeaconContext) -> Int[Array, "B S"]:
        """A query sees the memories of windows before this one."""
        if self.condensing.attend_previous:
            return ctx.window
        return jnp.where(ctx.is_beacon, -1, ctx.window)

    def _memories(self, k: Array, v: Array, ctx: BeaconContext) -> list[Source]:
        """Beacons of the piece, and sinks in it, to queries of later windows."""
        ids, clock, raw = ctx.segment_ids, self._memory_clock(ctx), ctx.raw
        assert ids is not None
        beacons = Source(
            self._rotate(k[:, raw:], ctx.memory),
            v[:, raw:],
            clock,
            ctx.window[:, raw:] + 1,
            ids[:, raw:],
            mask=CAUSAL,
        )
        if not self.condensing.sinks:
            return [beacons]
        # The position of a sink as a memory is the one it has in its window.
        is_sink = (ctx.window == 0) & (ctx.positions < self.condensing.sinks)
        sinks = Source(
            self._rotate(k, ctx.positions)[:, :raw],
            v[:, :raw],
            clock,
            ctx.window[:, :raw] + 1,
            jnp.where(is_sink, ids, 0)[:, :raw],
            mask=CAUSAL,
        )
        return [beacons, sinks]

    def _own_window(self, k: Array, v: Array, ctx: BeaconContext) -> list[Source]:
        """Slots of the piece to queries of their own window."""
        ids, clock, raw = ctx.segment_ids, ctx.clock, ctx.raw
        assert ids is not None
        k = self._rotate(k, ctx.positions)
        parts = [(k[:, :raw], v[:, :raw]), (k[:, raw:], v[:, raw:])]
        ids_of, clock_of = (ids[:, :raw], ids[:, raw:]), (clock[:, :raw], clock[:, raw:])
        own = Mask(causal=True, window=2 * self.condensing.window)
        if self.condensing.interleaved:
            # As one source, the blocks of keys between a query's raw tokens and its beacons would be walked.
            return [Source(*kv, clock, at, i, mask=own) for kv, at, i in zip(parts, clock_of, ids_of)]
        beacons = jnp.where(ctx.is_beacon, ctx.chunk, -1)  # of queries: raw tokens see none
        itself = Source(*parts[1], beacons, ctx.chunk[:, raw:], ids_of[1], mask=SAME)
        if self.condensing.variant != "segmentation":
            return [Source(*parts[0], clock, clock_of[0], ids_of[0], mask=own), itself]
        tokens = Source(*parts[0], jnp.where(ctx.is_beacon, -1, clock), clock_of[0], ids_of[0], mask=own)
        condensed = Source(*parts[0], beacons, ctx.chunk[:, :raw], ids_of[0], mask=SAME)
        return [tokens, condensed, itself]

    def _in_caches(self, state: State, ctx: BeaconContext) -> list[Source]:
        """The caches as they were, to queries that go on with their document."""
        c, carried = self.condensing, ctx.cached
        assert carried is not None

        def source(name: str, begin, clock, kv_clock, held, mask) -> Source:
            k, v = state[name]["k"], state[name]["v"]
            index = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
            rotated = self._rotate(k, begin + index)
            positions = jnp.broadcast_to(kv_clock(index), index.shape)
            return Source(rotated, v, clock, positions, jnp.ones_like(index), held, mask)

        window, begin = carried.window[:, None], carried.settled[:, None]
        memory = source(
            "memory",
            0,
            self._memory_clock(ctx),
            lambda index: window + (index >= begin),
            carried.memories,
            CAUSAL,
        )
        own = Mask(causal=True, window=2 * c.window)
        clock, first = ctx.clock, window * (4 * c.window)
        if c.variant != "segmentation":
            return [memory, source("window", begin, clock, lambda _: first, carried.slots, own)]
        tokens, beacons = jnp.where(ctx.is_beacon, -1, clock), jnp.where(ctx.is_beacon, ctx.chunk, -1)
        ratio = carried.ratio[:, None]
        chunks = lambda index: window * c.window + index // ratio  # noqa: E731
        return [
            memory,
            source("window", begin, tokens, lambda _: first, carried.slots, own),
            source("window", begin, beacons, chunks, carried.slots, SAME),
        ]

    def _write_slots(self, state: State | None, k: Array, v: Array, ctx: BeaconContext) -> State | None:
        """The caches after a piece."""
        if state is None:
            return None
        places = {"memory": ctx.memory_slot, "window": ctx.window_slot}
        refuse_overflow(ctx.memory_slot, state["memory"]["k"].shape[1])
        return {
            name: {part: store(state[name][part], place, new) for part, new in (("k", k), ("v", v))}
            for name, place in places.items()
        }


def refuse_overflow(places: Array, held: int) -> None:
    """Raises ValueError if a cache of ``held`` memories is too short, where that can be known: not in jit."""
    if isinstance(places, jax.core.Tracer):
        return
    needed = 1 + int(np.max(np.where(places < NOWHERE, places, -1)))
    if needed > held:
        raise ValueError(
            f"beacon: the cache holds {held} sinks and beacons, {needed} are needed; raise max_len"
        )

"""Core-context-aware attention as a sequence mixer (Chen et al. 2024, arXiv 2412.12465).

Attention whose older keys are pooled, a core for each group of tokens (``pallas_kernels.cca``). It has the
parameters of full attention under the same names: what was trained with one runs, or trains on, with the
other.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from layers.attention import Attention, AttentionConfig, cache_slots, refuse_overflow, store
from layers.param import Initializer, uniform_fan_in
from layers.types import Context, State
from pallas_kernels import time_order
from pallas_kernels.attention import Mask, Source
from pallas_kernels.cca import (
    POOLINGS,
    Groups,
    all_seen,
    core_context_attention,
    core_source,
    local_span,
    pool,
    pool_slots,
    token_source,
)

ROTATIONS = ("before", "after")


@dataclasses.dataclass
class CCAConfig(AttentionConfig):
    """Shape of a layer; ``causal=False`` and ``position="alibi"`` are refused.

    Attributes:
        window: tokens that every query sees as they are, at least; at most ``group_size`` - 1 more.
        group_size: tokens of a group, whose core is all that is seen of it from further away. Both can be
            changed without training.
        pooling: weights of the tokens of a group: "mean" over the query heads of a key head, or "per_head":
            a core for each query head, in a core cache as many times larger.
        core_rotation: with ``position="rope"``, keys are rotated "before" they are pooled: the logit of a
            core is the mean of its tokens' logits. Or "after", at the position of the group's last token.
        literal_boundary: see the newest core's last token twice, as the paper's formula has it.
    """

    window: int = 1024
    group_size: int = 16
    pooling: str = "mean"
    core_rotation: str = "before"
    literal_boundary: bool = False

    @classmethod
    def like(cls, attention: AttentionConfig, *, group_size: int, window: int) -> "CCAConfig":
        """A layer that takes the parameters of one of full attention."""
        same = {f.name: getattr(attention, f.name) for f in dataclasses.fields(AttentionConfig)}
        return cls(**{**same, "group_size": group_size, "window": window})


class Piece(NamedTuple):
    """Projections of some tokens; ``plain`` are the keys before the rotation."""

    q: Float[Array, "B L H E"]
    k: Float[Array, "B L K E"]
    v: Float[Array, "B L K E"]
    plain: Float[Array, "B L K E"]


class CoreContextAttention(Attention):
    """A sequence mixer (``layers.types.SequenceMixer``) with recent tokens and cores as its state.

    State: ``k``, ``v`` [B, R, K, E] the last R = window + group_size tokens of the carried segment, number n
    in slot n % R (all of them, if ``max_len`` is smaller); ``core_k``, ``core_v`` [B, ceil(max_len /
    group_size), C, E] the cores of its complete groups, C = K (H for ``pooling="per_head"``); ``length``
    int32 [B], its tokens so far; for ``core_rotation="after"`` ``plain`` [B, group_size, K, E], the keys of
    the growing group before the rotation.

    Raises:
        ValueError: a field of the config whose value cannot work.
    """

    field = "cca"
    config: CCAConfig

    def __init__(
        self,
        d_model: int,
        config: CCAConfig,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        _validate(config)
        super().__init__(d_model, config, rngs=rngs, init=init, out_init=out_init)
        self.core_heads = self.heads if config.pooling == "per_head" else self.kv_heads
        self.span = local_span(config.group_size, config.window, config.literal_boundary)
        self.scale = self.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale

    def init_state(self, batch: int, max_len: int) -> State:
        """No tokens yet."""
        c = self.config

        def zeros(slots: int, heads: int) -> Array:
            return jnp.zeros((batch, slots, heads, self.head_dim), c.cache_dtype)

        ring, cores = min(c.window + c.group_size, max_len), -(-max_len // c.group_size)
        state = {name: zeros(ring, self.kv_heads) for name in ("k", "v")}
        state |= {name: zeros(cores, self.core_heads) for name in ("core_k", "core_v")}
        if c.core_rotation == "after":
            state["plain"] = zeros(c.group_size, self.kv_heads)
        return {**state, "length": jnp.zeros(batch, jnp.int32)}

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        if state is None:
            v, mix = self.mixing(x, ctx)
            return self._merge_heads(mix(v)), None
        piece = self._piece(x, ctx)
        before = state["length"] if ctx.continues is None else jnp.where(ctx.continues, state["length"], 0)
        if x.shape[1] == 1:
            cores = self._complete_group(state, before, piece, _ids(piece, ctx) != 0, ctx)
            after = self._advance(state, before, piece, cores, ctx)
            y = self._attend(piece.q, self._seen_by_last(after), ctx)
        else:
            y, after = self._next_piece(state, before, piece, ctx)
        return self._merge_heads(y), after

    def mixing(
        self, x: Float[Array, "B L D"], ctx: Context
    ) -> tuple[Float[Array, "B L K E"], Callable[[Array], Array]]:
        """As of `Attention`: values of whole documents, and the heads' output, a linear function of them."""
        piece = self._piece(x, ctx)
        return piece.v, lambda v: self._one_pass(piece._replace(v=v), ctx)

    def cache_room(self, state: State) -> Int[Array, " B"]:
        """Tokens that still fit, negative where some were lost."""
        return self._room(state) - state["length"]

    def flops_per_token(self, length: int) -> float:
        """Mean over a document of ``length`` tokens: cores and tokens that are seen, and pooling."""
        c, heads, width = self.config, self.heads, self.head_dim
        # n(t) = floor((t + 1 - window) / group_size) cores stand for group_size tokens each.
        q, r = divmod(max(length - c.window, 0) + 1, c.group_size)
        cores = (c.group_size * q * (q - 1) / 2 + q * r) / length
        seen = (length + 1) / 2 - (c.group_size - 1) * cores
        projections = 2.0 * self.d_model * width * (2 * heads + 2 * self.kv_heads)
        return projections + 4.0 * heads * width * seen + 2.0 * width * (heads + 2 * self.core_heads)

    def _piece(self, x: Array, ctx: Context) -> Piece:
        q, k, v = self._heads(x)
        return Piece(self._rotate(q, ctx.positions), self._rotate(k, ctx.positions), v, k)

    def _one_pass(self, piece: Piece, ctx: Context) -> Array:
        """Whole documents."""
        c, (batch, length) = self.config, piece.q.shape[:2]
        if c.core_rotation == "before":
            return core_context_attention(
                *piece[:3],
                group_size=c.group_size,
                window=c.window,
                segment_ids=ctx.segment_ids,
                softmax_scale=c.softmax_scale,
                literal_boundary=c.literal_boundary,
                pooling=c.pooling,
                implementation=c.implementation,
            )
        if all_seen(length, c.group_size, c.window):
            full = Source(piece.k, piece.v, kv_segment_ids=ctx.segment_ids, mask=Mask(causal=True))
            return self._attend(piece.q, [full], ctx)
        groups = Groups.of(batch, length, c.group_size, ctx.segment_ids, literal_boundary=c.literal_boundary)
        cores = core_source(self._pool(piece, groups, ctx), groups, c.window)
        return self._attend(piece.q, [cores, self._tokens(piece, ctx.segment_ids, groups)], ctx)

    def _next_piece(self, state: State, before: Array, piece: Piece, ctx: Context) -> tuple[Array, State]:
        """Output and state of several tokens, after ``before`` [B] of segment 1."""
        c, (batch, length) = self.config, piece.q.shape[:2]
        ids = _ids(piece, ctx)
        ctx = dataclasses.replace(ctx, segment_ids=ids)
        groups = Groups.of(batch, length, c.group_size, ids, before, literal_boundary=c.literal_boundary)
        own_cores = self._pool(piece, groups, ctx)
        grown = self._complete_group(state, before, piece, ids == 1, ctx)
        kept = (groups.segment_ids == ids.max(axis=1, keepdims=True)) & (groups.segment_ids != 0)
        slot = jnp.where(kept, groups.number, grown[0].shape[1])
        cores = tuple(store(old, slot, new) for old, new in zip(grown, own_cores))
        after = self._advance(state, before, piece, cores, ctx)

        numbers = before[:, None] + ctx.count(ids != 0) - 1
        cached_ids = jnp.ones((batch, state["k"].shape[1]), jnp.int32)
        tokens = dataclasses.replace(self._cached(state, before, numbers), kv_segment_ids=cached_ids)
        sources = [tokens, self._tokens(piece, ids, groups)]
        if not all_seen(length, c.group_size, c.window):
            sources.append(core_source(own_cores, groups, c.window))
        if self._cores_can_be_seen(state):
            last = jnp.arange(1, grown[0].shape[1] + 1, dtype=jnp.int32) * c.group_size - 1
            last = jnp.tile(last, (batch, 1))
            held = -(-before // c.group_size)
            core_ids = jnp.ones_like(last)
            sources.append(Source(*grown, numbers, last + c.window, core_ids, held, Mask(causal=True)))
        return self._attend(piece.q, sources, ctx), after

    def _pool(self, piece: Piece, groups: Groups, ctx: Context) -> tuple[Array, Array]:
        """Core keys and values of the groups that lie in the piece as a whole."""
        plain = piece.plain if self.config.core_rotation == "after" else None
        core_k, core_v = pool(
            *piece[:3], groups, scale=self.scale, pooling=self.config.pooling, pooled_k=plain
        )
        return self._place(core_k, groups.at_ends(ctx.positions)), core_v

    def _place(self, core_k: Array, positions: Array) -> Array:
        """Core keys with the positions of their groups' last tokens, if they are to have them."""
        return self._rotate(core_k, positions) if self.config.core_rotation == "after" else core_k

    def _tokens(self, piece: Piece, segment_ids: Array | None, groups: Groups) -> Source:
        return token_source(piece.k, piece.v, segment_ids, groups, self.span)

    def _complete_group(
        self, state: State, before: Array, piece: Piece, own: Array, ctx: Context
    ) -> tuple[Array, Array]:
        """The core caches, with the core of the group that the state has begun and the piece completes.

        ``own`` [B, L]: the tokens that continue the state.
        """
        size, (batch, length) = self.config.group_size, own.shape
        rows, number = jnp.arange(batch)[:, None], before // size
        wanted = (number * size)[:, None] + jnp.arange(size)
        cached = wanted < before[:, None]
        in_time = time_order.restore(own, ctx.sequence_layout)
        index = in_time.argmax(axis=1)[:, None] + wanted - before[:, None]
        # Where the piece has a token of that index in time.
        place = jnp.asarray(np.argsort(time_order.positions(length)))[jnp.clip(index, 0, length - 1)]

        def members(name: str, new: Array) -> Array:
            cache = state[name]
            old = cache[rows, wanted % cache.shape[1]].astype(new.dtype)
            return jnp.where(cached[..., None, None], old, new[rows, place])[:, None]

        keys = [members(name, new) for name, new in zip(("k", "v", "plain"), piece[1:]) if name in state]
        end = place[:, -1:]
        core_k, core_v = pool_slots(piece.q[rows, end], [(keys, None)], self.scale, self.config.pooling)
        core_k = self._place(core_k, ctx.positions[rows, end])
        completed = before + own.sum(axis=1) >= (number + 1) * size
        if length > 1:  # a group that begins with the piece is pooled with the others
            completed &= before % size != 0
        slot = jnp.where(completed, number, state["core_k"].shape[1])[:, None]
        return store(state["core_k"], slot, core_k), store(state["core_v"], slot, core_v)

    def _advance(
        self, state: State, before: Array, piece: Piece, cores: Sequence[Array], ctx: Context
    ) -> State:
        """The state after a piece, given the core caches after it."""
        size, length = self.config.group_size, piece.q.shape[1]
        ring = state["k"].shape[1]
        slot, total = cache_slots(before, ctx, length, ring, ring=self._wraps(ring))
        refuse_overflow(total, self._room(state))
        after = {name: store(state[name], slot, x) for name, x in (("k", piece.k), ("v", piece.v))}
        if "plain" in state:
            slot, _ = cache_slots(before, ctx, length, size, ring=True)
            after["plain"] = store(state["plain"], slot, piece.plain)
        return {**after, "core_k": cores[0], "core_v": cores[1], "length": total}

    def _room(self, state: State) -> int:
        ring = state["k"].shape[1]
        return state["core_k"].shape[1] * self.config.group_size if self._wraps(ring) else ring

    def _wraps(self, slots: int) -> bool:
        return slots == self.config.window + self.config.group_size

    def _cores_can_be_seen(self, state: State) -> bool:
        return not all_seen(self._room(state), self.config.group_size, self.config.window)

    def _cached(self, state: State, length: Array, q_numbers: Array) -> Source:
        """The tokens in the cache, each seen until the core of its group is."""
        source, c = super()._cached(state, length, q_numbers), self.config
        assert source.kv_positions is not None
        starts = source.kv_positions - (source.kv_positions + int(c.literal_boundary)) % c.group_size
        return dataclasses.replace(source, mask=Mask(window=self.span), kv_window_positions=starts)

    def _seen_by_last(self, state: State) -> list[Source]:
        """What the last token in ``state`` sees."""
        length = state["length"]
        sources = [self._cached(state, length, length[:, None] - 1)]
        if self._cores_can_be_seen(state):
            visible = jnp.maximum(length - self.config.window, 0) // self.config.group_size
            sources.append(Source(state["core_k"], state["core_v"], kv_length=visible))
        return sources


def _ids(piece: Piece, ctx: Context) -> Int[Array, "B L"]:
    return jnp.ones(piece.q.shape[:2], jnp.int32) if ctx.segment_ids is None else ctx.segment_ids


def _validate(config: CCAConfig) -> None:
    c = config
    if not c.causal:
        raise ValueError("cca.causal=False: a core stands for the past; bidirectional layers use attention")
    if c.position not in ("rope", "none"):
        raise ValueError(
            f"cca.position={c.position!r}: a core has no single distance to bias; use 'rope' or 'none'"
        )
    if c.window is None or c.window < 1 or c.group_size < 1:
        raise ValueError(f"cca.window={c.window} and cca.group_size={c.group_size} must be at least 1")
    if c.group_size > c.window:
        raise ValueError(
            f"cca.group_size={c.group_size} is larger than cca.window={c.window}, which should hold at "
            f"least one group; use a group_size of at most {c.window}, or a larger window"
        )
    if c.pooling not in POOLINGS:
        raise ValueError(f"cca.pooling={c.pooling!r} is unknown; use one of {POOLINGS}")
    if c.core_rotation not in ROTATIONS or (c.core_rotation == "after" and c.position != "rope"):
        raise ValueError(
            f"cca.core_rotation={c.core_rotation!r} with cca.position={c.position!r}: use one of "
            f"{ROTATIONS}; 'after' needs 'rope'"
        )

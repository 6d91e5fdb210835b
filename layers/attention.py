"""Softmax attention as a sequence mixer: grouped heads, rotary or linear-bias positions, window, KV cache."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from layers.alibi import alibi_slopes
from layers.norm import RMSNorm
from layers.param import Initializer, Linear, uniform_fan_in
from layers.rope import RopeConfig, apply_rope, rotary_dim
from layers.types import Context, State
from pallas_kernels.attention import Alibi, Mask, Source, attention

POSITIONS = ("rope", "alibi", "none")


@dataclasses.dataclass
class AttentionConfig:
    """Shape of an attention layer.

    Attributes:
        num_kv_heads: key heads, each shared by num_heads / num_kv_heads query heads; None for num_heads.
        head_dim: None for d_model / num_heads.
        position: "rope", "alibi", or "none" (no signal, or one added to the embeddings).
        window: a token sees the last ``window`` tokens including itself; None for all.
        causal: False for an encoder, which has no state.
        qk_norm: RMSNorm over the head dim of queries and keys, before the rotation.
        qkv_bias, out_bias: biases of the projections.
        softmax_scale: of the logits, None for head_dim ** -0.5.
        cache_dtype: of the cached keys and values.
        implementation: of the op, None for automatic.
    """

    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    position: str = "rope"
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    window: int | None = None
    causal: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    softmax_scale: float | None = None
    cache_dtype: str = "float32"
    implementation: str | None = None


class Attention(nnx.Module):
    """A sequence mixer (``layers.types.SequenceMixer``) with a key/value cache as its state.

    State: ``k``, ``v`` [B, M, K, E], keys after the rotation, and ``length`` int32 [B], the number of tokens
    of the carried segment so far. Token number n of the segment is in slot n, with a window in slot n % M.
    M is ``max_len``, or the window if that is smaller. A cache without a window that is full drops what comes
    after: ``length`` counts on, so :meth:`cache_room` turns negative, and outside ``jit`` the call raises.

    Raises:
        ValueError: a field of the config whose value cannot work.
    """

    field = "attention"  # of the model's config, in messages

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig,
        *,
        rngs: nnx.Rngs,
        init: Initializer = uniform_fan_in,
        out_init: Initializer | None = None,
    ):
        self.config, self.d_model, self.causal = config, d_model, config.causal
        self.heads = config.num_heads
        self.kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.head_dim or d_model // config.num_heads
        _validate(self.field, config, d_model, self.head_dim)
        q_width, kv_width, bias = self.heads * self.head_dim, self.kv_heads * self.head_dim, config.qkv_bias
        self.q = Linear(d_model, q_width, ("embed", "heads"), rngs=rngs, use_bias=bias, init=init)
        self.k = Linear(d_model, kv_width, ("embed", "kv_heads"), rngs=rngs, use_bias=bias, init=init)
        self.v = Linear(d_model, kv_width, ("embed", "kv_heads"), rngs=rngs, use_bias=bias, init=init)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.out = Linear(
            q_width,
            d_model,
            ("heads", "embed"),
            rngs=rngs,
            use_bias=config.out_bias,
            init=out_init or init,
        )

    def init_state(self, batch: int, max_len: int) -> State:
        """An empty cache. Raises ValueError for a layer that is not causal."""
        if not self.causal:
            raise ValueError("attention.causal=False: a bidirectional layer cannot stream, it has no state")
        slots = max_len if self.config.window is None else min(self.config.window, max_len)
        zeros = jnp.zeros((batch, slots, self.kv_heads, self.head_dim), self.config.cache_dtype)
        return {"k": zeros, "v": zeros, "length": jnp.zeros(batch, jnp.int32)}

    def __call__(
        self, x: Float[Array, "B L D"], state: State | None, ctx: Context
    ) -> tuple[Float[Array, "B L D"], State | None]:
        if state is None:
            v, mix = self.mixing(x, ctx)
            return self._merge_heads(mix(v)), None
        if not self.causal:
            raise ValueError("attention.causal=False: a bidirectional layer takes no state")
        q, k, v = self._project(x, ctx)
        before = state["length"] if ctx.continues is None else jnp.where(ctx.continues, state["length"], 0)
        after = self._write(state, before, k, v, ctx)
        if x.shape[1] == 1:
            y = self._attend(q, [self._cached(after, after["length"], after["length"][:, None] - 1)], ctx)
        else:
            y = self._attend(q, self._cache_and_piece(state, before, k, v, ctx), ctx)
        return self._merge_heads(y), after

    def mixing(
        self, x: Float[Array, "B L D"], ctx: Context
    ) -> tuple[Float[Array, "B L K E"], Callable[[Array], Array]]:
        """Values of whole documents, and the output of the heads [B, L, H, E], a linear function of them."""
        q, k, v = self._project(x, ctx)
        mask = Mask(self.causal, self.config.window)
        return v, lambda v: self._attend(q, [Source(k, v, kv_segment_ids=ctx.segment_ids, mask=mask)], ctx)

    def cache_room(self, state: State) -> Int[Array, " B"] | None:
        """Tokens that still fit, negative where some were lost; None for a window, which takes any number."""
        slots = state["k"].shape[1]
        return None if self._wraps(slots) else slots - state["length"]

    def flops_per_token(self, length: int) -> float:
        """Mean over a sequence of ``length`` tokens; a causal token pays for the keys it sees."""
        seen = float(length)
        if self.causal:
            window = min(self.config.window or length, length)
            seen = window - window * (window - 1) / (2 * length)
        widths = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2.0 * self.d_model * widths + 4.0 * self.heads * self.head_dim * seen

    def _project(self, x: Array, ctx: Context) -> tuple[Array, Array, Array]:
        q, k, v = self._heads(x)
        return self._rotate(q, ctx.positions), self._rotate(k, ctx.positions), v

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values by head, without positions."""
        batch, length, _ = x.shape
        q, k, v = (p(x).reshape(batch, length, -1, self.head_dim) for p in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _rotate(self, x: Array, positions: Array) -> Array:
        return apply_rope(x, positions, self.config.rope) if self.config.position == "rope" else x

    def _attend(self, q: Array, sources: list[Source], ctx: Context) -> Array:
        c = self.config
        return attention(
            q,
            sources,
            q_segment_ids=ctx.segment_ids,
            softmax_scale=c.softmax_scale,
            bias=Alibi(jnp.asarray(alibi_slopes(self.heads))) if c.position == "alibi" else None,
            implementation=c.implementation,
        )

    def _merge_heads(self, y: Array) -> Array:
        return self.out(y.reshape(*y.shape[:2], -1))

    def _wraps(self, slots: int) -> bool:
        """Whether the cache is a ring: it holds a whole window."""
        return slots == self.config.window

    def _cached(self, state: State, length: Array, q_numbers: Array) -> Source:
        """The first ``length`` [B] tokens of the segment, as far as ``state`` holds them, as a source.

        ``q_numbers`` [B, L]: which token of the segment each query is.
        """
        slots, window = state["k"].shape[1], self.config.window
        numbers = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (length.shape[0], slots))
        if self._wraps(slots):  # the latest token of each slot
            last = length[:, None] - 1
            numbers = last - (last - numbers) % slots
        held = jnp.minimum(length, slots)
        return Source(state["k"], state["v"], q_numbers, numbers, kv_length=held, mask=Mask(window=window))

    def _cache_and_piece(self, state: State, before: Array, k: Array, v: Array, ctx: Context) -> list[Source]:
        """What a piece of several tokens sees: the cache as it was, which is segment 1, and itself."""
        batch, length = k.shape[:2]
        real = jnp.ones((batch, length), bool) if ctx.segment_ids is None else ctx.segment_ids != 0
        numbers = before[:, None] + ctx.count(real) - 1
        cached_ids = None
        if ctx.segment_ids is not None:
            # Only tokens of segment 1 see the cache, and before them there is nothing but padding.
            cached_ids = jnp.ones((batch, state["k"].shape[1]), jnp.int32)
        cache = dataclasses.replace(self._cached(state, before, numbers), kv_segment_ids=cached_ids)
        mask = Mask(causal=True, window=self.config.window)
        return [cache, Source(k, v, kv_segment_ids=ctx.segment_ids, mask=mask)]

    def _write(self, state: State, before: Array, k: Array, v: Array, ctx: Context) -> State:
        """The cache after a piece: the tokens of its last segment, after ``before`` [B] if it was carried."""
        slots = state["k"].shape[1]
        slot, total = cache_slots(before, ctx, k.shape[1], slots, ring=self._wraps(slots))
        if not self._wraps(slots):
            refuse_overflow(total, slots)
        return {"k": store(state["k"], slot, k), "v": store(state["v"], slot, v), "length": total}


def cache_slots(
    before: Int[Array, " B"], ctx: Context, length: int, slots: int, *, ring: bool
) -> tuple[Int[Array, "B L"], Int[Array, " B"]]:
    """Slot of each token of a piece in a cache of its last segment, and that segment's tokens so far.

    Args:
        before: tokens of segment 1 so far.
        ctx, length: of the piece.
        slots, ring: of the cache: a ring keeps the last ``slots`` tokens, number n in slot n % slots. What is
            not kept gets the slot ``slots``, which :func:`store` drops.
    """
    ids = jnp.ones((before.shape[0], length), jnp.int32) if ctx.segment_ids is None else ctx.segment_ids
    last = ids.max(axis=1, keepdims=True)
    kept: Bool[Array, "B L"] = (ids == last) & (ids != 0)
    first = jnp.where(last > 1, 0, before[:, None])
    number = first + ctx.count(kept) - 1
    total = first[:, 0] + kept.sum(axis=1, dtype=jnp.int32)
    slot = number
    if ring:
        kept, slot = kept & (number >= total[:, None] - slots), number % slots
    return jnp.where(kept, slot, slots), total


def store(
    cache: Float[Array, "B M K E"], slot: Int[Array, "B L"], new: Float[Array, "B L K E"]
) -> Float[Array, "B M K E"]:
    """``cache`` with ``new`` in its slots; a slot that does not exist drops it."""
    if slot.size == 1:
        # Twice the same, and so still a scatter, which XLA does in place. Of a single one it makes a slice
        # update that drops by choosing between two caches, and is done again for each who reads it.
        slot, new = jnp.repeat(slot, 2, axis=1), jnp.repeat(new, 2, axis=1)
    rows = jnp.arange(cache.shape[0])[:, None]
    return cache.at[rows, slot].set(new.astype(cache.dtype), mode="drop")


def refuse_overflow(total: Array, slots: int) -> None:
    """Raises ValueError if a cache is too short, where that can be known: not under ``jit``."""
    if isinstance(total, jax.core.Tracer):
        return
    needed = int(np.max(total))
    if needed > slots:
        raise ValueError(f"attention: the cache holds {slots} tokens, {needed} are needed; raise max_len")


def _validate(field: str, config: AttentionConfig, d_model: int, head_dim: int) -> None:
    c = config
    if c.head_dim is None and d_model % c.num_heads:
        raise ValueError(
            f"{field}.num_heads={c.num_heads} does not divide d_model={d_model}; set {field}.head_dim"
        )
    if c.num_kv_heads is not None and c.num_heads % c.num_kv_heads:
        raise ValueError(f"{field}.num_kv_heads={c.num_kv_heads} does not divide num_heads={c.num_heads}")
    if c.position not in POSITIONS:
        raise ValueError(f"{field}.position={c.position!r} is unknown; use one of {POSITIONS}")
    if c.window is not None and (c.window < 1 or not c.causal):
        raise ValueError(f"{field}.window={c.window} must be at least 1, and needs {field}.causal=True")
    if c.position == "rope":
        rotary_dim(c.rope, head_dim)

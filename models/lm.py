"""The decoder language model: embedding, a pattern of sub-layers, final norm, tied or untied head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from layers.embedding import Embedding
from layers.norm import NORMS
from layers.param import Initializer, Linear, normal
from layers.types import Context, State
from models import decimate
from models.backbone import Backbone
from models.config import LMConfig
from pallas_kernels import spmd, time_order


class LM(nnx.Module):
    """``hidden, state, out = lm(tokens, state)``; ``lm.logits(hidden)`` where logits are wanted."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        embedding_std = normal(0.02 if config.init_std is None else config.init_std)
        self.embed = Embedding(
            config.padded_vocab_size,
            config.d_model,
            rngs=rngs,
            max_positions=config.max_positions,
            init=embedding_std,
            scale=config.embedding_scale,
        )
        self.backbone = self._make_backbone(rngs)
        self.norm = NORMS[config.norm](config.d_model, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else self._make_head(rngs, embedding_std)

    def _make_backbone(self, rngs: nnx.Rngs) -> Backbone:
        return Backbone(self.config, rngs=rngs)

    def _make_head(self, rngs: nnx.Rngs, init: Initializer) -> Linear:
        sizes, axes = (self.config.d_model, self.config.padded_vocab_size), ("embed", "vocab_out")
        return Linear(*sizes, axes, rngs=rngs, init=init, role="head")

    def init_state(self, batch: int, max_len: int) -> State:
        """State before any token: the mixers' states, and the last real segment id and position per row."""
        return {
            "layers": self.backbone.init_state(batch, max_len),
            "segment": jnp.zeros(batch, jnp.int32),
            "position": jnp.full(batch, -1, jnp.int32),
        }

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        state: State | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        sequence_layout: str = "contiguous",
        **static: Any,
    ) -> tuple[Float[Array, "B L D"], State | None, dict[str, Any]]:
        """Final-normed hidden states, the state after the last token, and named intermediates.

        Args:
            tokens: token ids.
            state: from ``init_state`` or an earlier call; None in training, where nothing is carried.
            segment_ids: raw document ids, 0 for padding; equal to the last id of the piece before where a
                document continues. None: every token is real and continues the row.
            positions: positions in the documents; counted from segment starts and on from the state if None.
            sequence_layout: order to compute in where time is sharded and ``time_order.usable``. Arguments
                and results are in the order of time, but for ``out["arranged"]``: the hidden states as they
                were computed, for who can do with that order and saves the way back.
            static: further fields of ``Context``.

        With ``config.decimate``, the layers that follow do not read all of a prompt: ``out["kept"]`` [B, L]
        tells which tokens have hidden states.
        """
        batch, length = tokens.shape
        segment_ids = None if segment_ids is None else spmd.replicate_time(segment_ids)
        ctx = Context.create(
            batch,
            length,
            positions=None if positions is None else spmd.replicate_time(positions),
            segment_ids=segment_ids,
            previous_segment=None if state is None else state["segment"],
            previous_position=None if state is None else state["position"],
            sequence_axis=spmd.SEQUENCE if spmd.sequence_parts() > 1 else None,
            **static,
        )
        ctx = in_time = jax.tree.map(spmd.replicate_time, ctx)
        layout = time_order.usable(sequence_layout, length)
        if layout != time_order.CONTIGUOUS:
            tokens, ctx = time_order.arrange_sharded(tokens, layout), ctx.arranged(layout)
        dtype = jnp.dtype(self.config.dtype)
        x = self.embed(tokens, ctx.positions, dtype).astype(self.config.residual_dtype)
        x, more = spmd.shard_activations(x), dict[str, Any]()
        states = None if state is None else state["layers"]
        if self.config.decimate.layers and states is not None and length > 1:
            x, layers, more["kept"] = decimate.read(self.backbone, self.config.decimate, x, states, ctx)
        else:
            x, layers = self.backbone(x, states, ctx)
        arranged = self.norm(x, dtype=dtype)
        hidden, residual = (time_order.restore_sharded(t, layout) for t in (arranged, x))
        after = None if state is None else {"layers": layers, **_last(state, segment_ids, in_time)}
        return hidden, after, {"residual": residual, "arranged": arranged, **more}

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Unnormalised log-probabilities, float32 or wider; ids that only pad the vocabulary get -1e30."""
        logits = self.embed.attend(hidden) if self.head is None else self.head(hidden)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / self.config.logits_divisor
        if self.config.padded_vocab_size == self.config.vocab_size:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.config.vocab_size, logits, -1e30)

    def flops_per_token(self, length: int) -> float:
        """Forward operations per token at context ``length``, head included (2 per multiply-add)."""
        return (
            self.backbone.flops_per_token(length) + 2.0 * self.config.d_model * self.config.padded_vocab_size
        )


def _last(state: State, segment_ids: Int[Array, "B L"] | None, ctx: Context) -> State:
    """Segment id and position of the last real token of each row; those before where there is none."""
    if segment_ids is None:
        return {"segment": state["segment"], "position": ctx.positions[:, -1]}
    return {
        "segment": last_real(segment_ids, segment_ids, state["segment"]),
        "position": last_real(ctx.positions, segment_ids, state["position"]),
    }


def last_real(
    values: Int[Array, "B L"], segment_ids: Int[Array, "B L"], before: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The value of the last real token of each row; ``before`` where there is none."""
    last = segment_ids.shape[1] - 1 - jnp.argmax(segment_ids[:, ::-1] != 0, axis=1)
    found = jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
    return jnp.where((segment_ids != 0).any(axis=1), found, before)

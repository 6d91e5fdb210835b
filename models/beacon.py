"""Activation Beacon: a language model whose past is condensed into the keys and values of beacons.

Zhang et al. 2024, "Long Context Compression with Activation Beacon", arXiv:2401.03462. A plug-in: the
parameters are those of the attention model it is added to, at the same paths, and beside them an embedding of
the beacon and, in every attention layer, projections for beacons. Training them alone leaves the model
without beacons as it was. `layers.beacon_slots` says what sees what.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from layers.beacon import BeaconAttention
from layers.beacon_ratios import (
    Ratios,
    evaluation_ratios,
    evaluation_table,
    training_ratios,
)
from layers.beacon_slots import BeaconContext, lay_out
from layers.param import param
from layers.types import Context, State
from models.backbone import Backbone
from models.beacon_config import BeaconLMConfig
from models.functional import Tree
from models.lm import LM, last_real
from models.registry import KINDS, Kind
from pallas_kernels import spmd


class BeaconLM(LM):
    """An `LM`, with which it shares its contract: ``hidden, state, out = model(tokens, state)``.

    In training (``deterministic=False``) ratios are drawn with ``key`` and a document's last window has no
    beacons, which nobody would look at. Otherwise they are those of evaluation; with a state, those that were
    chosen for its ``max_len``. Windows begin where documents do, so that packed documents are as if alone; a
    row that begins inside a document begins a window there, whatever its ``positions``, which are not looked
    at. Hidden states are those of raw tokens, to which beacons are invisible.

    ``out`` has "residual" and "arranged" as in `LM`, and where anything is condensed "beacons" [B, N, D], the
    hidden states of beacons, and "slots", the `layers.beacon_slots.BeaconContext`.
    """

    config: BeaconLMConfig

    def __init__(self, config: BeaconLMConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        row = self.embed.table[...][config.beacon_init_id]
        self.beacon_embed = param(jnp.array(row), ("embed",), "embedding")

    def _make_backbone(self, rngs: nnx.Rngs) -> Backbone:
        module = functools.partial(BeaconAttention, condensing=self.config.beacon)
        return Backbone(self.config, rngs=rngs, kinds={**KINDS, "*": Kind(module, "attention")})

    def init_state(self, batch: int, max_len: int) -> State:
        """State before any token: caches with room for ``max_len`` condensed, and where each row is.

        ``ratios`` [B, n] by window, cyclic; ``tokens`` of the document so far; ``segment``, its id.
        """
        if self.config.beacon.plain:
            return super().init_state(batch, max_len)
        table = jnp.asarray(evaluation_table(self.config.beacon, max_len))
        return {
            "layers": self.backbone.init_state(batch, max_len),
            "segment": jnp.zeros(batch, jnp.int32),
            "tokens": jnp.zeros(batch, jnp.int32),
            "ratios": jnp.tile(table, (batch, 1)),
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
        """As `LM.__call__`; ``key`` and ``deterministic`` among ``static`` say whether this is training.

        Raises:
            ValueError: there are no tokens, the batch has no key to draw ratios with, a cache is too short
                (outside ``jit``), or training with a state.
        """
        if tokens.shape[1] == 0:
            raise ValueError(f"beacon: tokens is {list(tokens.shape)}; a document has at least one token")
        slots = self._slots(tokens, state, segment_ids, static)
        if slots is None:
            return super().__call__(
                tokens,
                state,
                segment_ids=segment_ids,
                positions=positions,
                sequence_layout=sequence_layout,
                **static,
            )
        slots = jax.tree.map(spmd.replicate_time, slots)
        raw, dtype = slots.raw, jnp.dtype(self.config.dtype)
        x = self.embed(tokens, slots.positions[:, :raw], dtype)
        beacon = spmd.replicate(self.beacon_embed[...].astype(dtype))
        beacons = jnp.broadcast_to(beacon, (x.shape[0], slots.positions.shape[1] - raw, x.shape[2]))
        x = jnp.concatenate([x, beacons], axis=1).astype(self.config.residual_dtype)
        x, layers = self.backbone(
            spmd.shard_activations(x), None if state is None else state["layers"], slots
        )
        hidden = self.norm(x, dtype=dtype)
        after = None
        if state is not None:
            segment = state["segment"]
            if segment_ids is not None:
                segment = last_real(segment_ids, segment_ids, segment)
            after = {**state, "layers": layers, "segment": segment, "tokens": slots.tokens}
        arranged = spmd.shard_activations(hidden[:, :raw])
        out = {"residual": x[:, :raw], "arranged": arranged, "beacons": hidden[:, raw:], "slots": slots}
        return arranged, after, out

    def _slots(
        self,
        tokens: Int[Array, "B L"],
        state: State | None,
        segment_ids: Int[Array, "B L"] | None,
        static: Mapping[str, Any],
    ) -> BeaconContext | None:
        """Where the beacons of a piece stand; None where there are none."""
        config, (batch, length) = self.config.beacon, tokens.shape
        training = not static.get("deterministic", True)
        if training and state is not None:
            raise ValueError("beacon: training carries no state; give whole documents, and state=None")
        if not training and config.plain:
            return None
        ctx = Context.create(
            batch,
            length,
            segment_ids=None if segment_ids is None else spmd.replicate_time(segment_ids),
            previous_segment=None if state is None else state["segment"],
            sequence_axis=spmd.SEQUENCE if spmd.sequence_parts() > 1 else None,
            **static,
        )
        if training:
            ratios = training_ratios(config, batch, length, static.get("key"))
        elif state is None:
            ratios = evaluation_ratios(config, length)
        else:
            ratios = Ratios(state["ratios"], config.window, min(config.evaluated))
        before = None if state is None else state["tokens"]
        return lay_out(config, ratios, ctx, before, last=not training)

    def flops_per_token(self, length: int) -> float:
        """Forward operations per raw token at context ``length`` in training, head included."""
        total = 2.0 * self.config.d_model * self.config.padded_vocab_size
        for run in self.backbone.runs:
            for layer in run.layers:
                # An attention layer counts its beacons itself.
                slots = 1 if isinstance(layer.mixer, BeaconAttention) else 1 + self.config.beacon.share
                total += run.repeats * slots * layer.mixer.flops_per_token(length)
        return total

    def kv_bytes(self, length: int) -> tuple[int, int]:
        """Bytes of the keys and values of ``length`` tokens of a row: condensed, and without beacons."""
        made = jax.tree.leaves(jax.eval_shape(lambda: self.backbone.init_state(1, length)))
        kept = [leaf for leaf in made if jnp.issubdtype(leaf.dtype, jnp.floating)]
        condensed = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
        attention, layers = self.config.attention, self.config.layers.count("*")
        heads = attention.num_kv_heads or attention.num_heads
        width = attention.head_dim or self.config.d_model // attention.num_heads
        item = jnp.dtype(attention.cache_dtype).itemsize
        return condensed, 2 * layers * length * heads * width * item


def copy_backbone(config: BeaconLMConfig, params: Tree) -> Tree:
    """``params`` with what the method adds made anew from the rest, as copies.

    The projections of beacons are those of raw tokens and the embedding is that of ``beacon.init_id``: the
    start of training on a pretrained model.
    """

    def copy(node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        made = {name: copy(child) for name, child in node.items()}
        if "beacon" in made:
            made["beacon"] = {name: jax.tree.map(jnp.array, node[name]) for name in node["beacon"]}
        return made

    row = params["embed"]["table"][config.beacon_init_id]
    return {**copy(params), "beacon_embed": jnp.array(row)}

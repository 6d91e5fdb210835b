"""HMT, the Hierarchical Memory Transformer (He et al. 2024, arXiv:2405.06067), around any language model.

A document is read in segments x_n of S tokens, each by a call of the backbone F of its own, at positions
from 0. What a segment knows of those before it comes by three ways: the last k tokens of the one before, read
again (sensory memory); its prompt P_n, an embedding that stands before and after its tokens (short-term
memory); and the memories M of the segments before, from which the prompt is recalled (long-term memory):

    s_n = F([T ; x_n[: j] ; T]) at the last slot             what the segment is about
    P_n = softmax(s_n W_q (Q W_k)^T / sqrt(h)) Q             Q the last Nq memories; without any, P_0
    h_n = F([P_n ; x_{n-1}[-k :] ; x_n ; P_n])               M_n its last slot; that of x_n goes to the head

F's output is that of the final norm. In training all s_n are computed at once, and one `lax.scan` walks the
segments with a queue of fixed size: one program whatever the number of segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from layers.types import Context, State
from models.hmt_config import HMTConfig
from models.hmt_memory import Memory, detach, forget
from models.hmt_segments import Part, Segments, cut, gather, part, remember, scatter
from models.lm import LM
from pallas_kernels import spmd

# What a step hands to the next: all but the first two only where a segment may go on in another piece.
MEMORY, UNDER_WAY = ("queue", "recent"), ("prompt", "layers", "segment")


class Read(NamedTuple):
    """What a step gives: hidden states of its tokens [B, W, D]; for each row M_n and P_n [B, D], and the
    weights of the memories recalled [B, Nq]. Of a row whose segment does not open or close: anything."""

    hidden: Array
    memory: Array
    prompt: Array
    weights: Array


class HMT(LM):
    """An `LM`, its parameters at their paths, and those of the memory in ``memory/...``.

    State: ``queue`` and ``recent`` (the last ids) of the document under way, ``phase`` (tokens read of the
    segment under way), ``prompt`` (its P_n), ``layers`` (the backbone's state, room for S + k + 2 tokens),
    ``segment`` (the id it has there) and ``document`` (raw id). Its size depends on no length.

    With ``memory.query`` "previous", outputs are causal, and any split of a document gives those of one pass.
    With "current", the paper's, the first j tokens of a segment choose among the memories for each other; so
    pieces give the outputs of one pass where they are whole segments, and a piece that ends within those j
    asks with those it has. Token by token there is nothing to look ahead at: a segment that is opened by a
    piece of one token asks as "previous" does.

    Raises:
        ValueError: a field of the config whose value cannot work.
    """

    def __init__(self, config: HMTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.recipe = config.memory
        self.memory = Memory(config, rngs=rngs)

    def init_state(self, batch: int, max_len: int) -> State:
        """State before any token; ``max_len`` does not matter."""
        return {
            "queue": self.memory.init_queue(batch),
            "recent": jnp.zeros((batch, max(self.recipe.sensory, self.recipe.summarised)), jnp.int32),
            "prompt": jnp.zeros((batch, self.config.d_model), jnp.float32),
            "layers": self.backbone.init_state(batch, self.recipe.slots),
            **{name: jnp.zeros(batch, jnp.int32) for name in ("segment", "phase", "document")},
        }

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        state: State | None = None,
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        sequence_layout: str = "contiguous",
        training: bool = False,
        **static: Any,
    ) -> tuple[Float[Array, "B L D"], State | None, dict[str, Any]]:
        """As `LM`: hidden states that go to the head, the state after the last token, named intermediates.

        Any packing, any phase of each row, any length; but it has no gradient, because the number of steps
        depends on the segment ids. With ``training`` it has: the steps are as many as ``memory.documents``
        says, and read whole segments: rows must not begin within one that the state has begun, and a state
        that such a call leaves within one is of no use.

        Args:
            segment_ids: raw ids of documents, as for `LM`.
            positions: not read; they are counted in each segment.
            sequence_layout: "contiguous".
            training: see above. Hidden states of tokens that were not reached are NaN. ``out`` then has
                ``read``, bool [B, L], which tokens were; and of the N steps ``memory`` and ``prompt``
                [N, B, D], ``weights`` [N, B, Nq], and ``summary`` [N, B, D] or None.
            static: nothing; the context of each call of the backbone is made here.

        Raises:
            ValueError: another ``sequence_layout``, or a field of ``Context``.
        """
        if static or sequence_layout != "contiguous":
            given = {"sequence_layout": sequence_layout, **static}
            raise ValueError(f"HMT takes sequence_layout='contiguous' and no field of Context, found {given}")
        before = self.init_state(len(tokens), 1) if state is None else state
        if segment_ids is None:
            raw = jnp.where(before["document"] == 0, 1, before["document"])
            segment_ids = jnp.broadcast_to(raw[:, None], tokens.shape)
        tokens, ids = spmd.replicate_time(tokens), spmd.replicate_time(segment_ids)
        segments = cut(ids, before["document"], before["phase"], self.recipe.segment)
        carried = MEMORY if training or state is None else MEMORY + UNDER_WAY
        walk = self._scan if training else self._loop
        carry, hidden, out = walk({name: before[name] for name in carried}, segments, tokens)
        hidden = spmd.shard_activations(hidden)
        after = {**before, **carry, "phase": segments.end, "document": segments.document}
        return hidden, None if state is None else after, {**out, "arranged": hidden}

    def flops_per_token(self, length: int) -> float:
        """Forward operations per token of a document of ``length`` tokens, head included."""
        recipe, width = self.recipe, self.config.d_model
        size, more = min(recipe.segment, length), length > recipe.segment
        slots = size + 2 + (recipe.sensory if more else 0)
        total = slots * self.backbone.flops_per_token(slots)
        if recipe.recall == "attention" and more:
            asked = recipe.summarised + 2
            total += asked * self.backbone.flops_per_token(asked)
            total += 2.0 * width * self.memory.recall_dim * (1 + recipe.queue) + 4.0 * width * recipe.queue
        return total / size + 2.0 * width * self.config.padded_vocab_size

    def _loop(
        self, carry: State, segments: Segments, tokens: Int[Array, "B L"]
    ) -> tuple[State, Float[Array, "B L D"], dict[str, Any]]:
        """As many steps as the row with the most needs, in the memory of one."""
        width = min(self.recipe.segment, tokens.shape[1])

        def body(step: Array | int, through: tuple[State, Array]) -> tuple[State, Array]:
            carry, hidden = through
            read = part(segments, tokens, step, width)
            carry = {**carry, "queue": forget(carry["queue"], read.fresh)}
            carry, given = self._step(carry, read, self._summary(carry, read))
            return carry, scatter(hidden, given.hidden, read)

        hidden = jnp.zeros((*tokens.shape, self.config.d_model), self.config.dtype)
        steps = 1 if tokens.shape[1] == 1 else segments.count.max()
        return *jax.lax.fori_loop(0, steps, body, (carry, hidden)), {}

    def _scan(
        self, carry: State, segments: Segments, tokens: Int[Array, "B L"]
    ) -> tuple[State, Float[Array, "B L D"], dict[str, Any]]:
        """A fixed number of steps, each of a whole segment; every s_n before the first of them."""
        recipe, length = self.recipe, tokens.shape[1]
        steps = jnp.arange(min(-(-length // recipe.segment) + recipe.documents - 1, length))
        parts = jax.vmap(lambda step: part(segments, tokens, step, recipe.segment))(steps)
        summaries = self._summaries(carry["recent"], parts) if recipe.recall == "attention" else None

        def body(carry: State, xs: tuple[Array, Part, Array | None]) -> tuple[State, Read]:
            step, read, summary = xs
            queue = forget(carry["queue"], read.fresh)
            if recipe.bptt_depth is not None:
                queue = detach(queue, step % recipe.bptt_depth == 0)
            go = lambda: self._step({**carry, "queue": queue}, read, summary)  # noqa: E731
            if recipe.documents == 1:
                return go()
            # Rows seldom hold as many documents as there are steps for: one without work costs nothing.
            nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(go)[1])
            return jax.lax.cond((read.count > 0).any(), go, lambda: (carry, nothing))

        if recipe.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        carry, given = jax.lax.scan(body, carry, (steps, parts, summaries))
        real, whole = segments.step >= 0, parts.phase[0] == 0
        reached = real & (segments.step < len(steps)) & whole[:, None]
        hidden = jnp.where(reached[..., None], gather(given.hidden, segments), 0)
        hidden = jnp.where((real & ~reached)[..., None], jnp.nan, hidden)
        out = {"read": reached, "memory": given.memory, "prompt": given.prompt, "weights": given.weights}
        return carry, hidden, {**out, "summary": summaries}

    def _step(self, carry: State, read: Part, summary: Array | None) -> tuple[State, Read]:
        """Read one part of one segment in each row; the queue has forgotten what it is to forget."""
        queue = carry["queue"]
        prompt, weights = self._prompt(queue, summary)
        if "layers" in carry:  # a segment that goes on keeps its prompt; another id is a fresh start for F
            prompt = jnp.where(read.opens[:, None], prompt, carry["prompt"])
            segment = jnp.where(read.opens, jnp.where(carry["segment"] == 1, 2, 1), carry["segment"])
            hidden, memory, layers = self._go_on(carry, read, prompt, segment)
            carry = {**carry, "prompt": prompt, "layers": layers, "segment": segment}
        else:
            x, used = self._slots(read, carry["recent"], prompt, queue["count"] > 0)
            hidden, memory = self._split(self._backbone(x, used)[0], read)
        queue = self.memory.push(queue, memory, read.closes)
        carry = {**carry, "queue": queue, "recent": remember(carry["recent"], read)}
        return carry, Read(hidden, memory, prompt, weights)

    def _go_on(
        self, carry: State, read: Part, prompt: Float[Array, "B D"], segment: Int[Array, " B"]
    ) -> tuple[Float[Array, "B W D"], Float[Array, "B D"], State]:
        """Hidden states of the tokens, M_n (of rows whose segment closes), and F's state after them."""
        known = carry["queue"]["count"] > 0
        filled = jnp.where(read.opens, 0, read.phase + 1 + self.recipe.sensory * known)
        state = {"layers": carry["layers"], "segment": carry["segment"]}

        def with_memory() -> tuple[Array, Array, State]:
            x, used = self._slots(read, carry["recent"], prompt, known)
            hidden, layers = self._backbone(x, used, filled, segment, state)
            return *self._split(hidden, read), layers

        def tokens_only() -> tuple[Array, Array, State]:
            x, used = self._lookup(read.tokens), (read.count > 0)[:, None]
            hidden, layers = self._backbone(x, used, filled, segment, state)
            return hidden, jnp.zeros_like(hidden[:, 0]), layers

        if read.tokens.shape[1] > 1:
            return with_memory()
        return jax.lax.cond((read.opens | read.closes).any(), with_memory, tokens_only)

    def _prompt(
        self, queue: State, summary: Array | None
    ) -> tuple[Float[Array, "B D"], Float[Array, "B Nq"]]:
        """P_n of a segment that opens, and the weights of the memories in it."""
        if summary is not None:
            return self.memory.recall(summary, queue)
        batch = len(queue["count"])
        recalled = self.memory.last(queue) if self.recipe.recall == "last" else self.memory.first(batch)
        return recalled, jnp.zeros((batch, self.recipe.queue), jnp.float32)

    def _slots(
        self, read: Part, recent: Int[Array, "B R"], prompt: Float[Array, "B D"], known: Bool[Array, " B"]
    ) -> tuple[Float[Array, "B n D"], Bool[Array, "B n"]]:
        """F's input [P_n ; sensory ; tokens ; P_n], n = k + W + 2, and which of it is there.

        What precedes the tokens is there where the segment opens, the sensory tokens where another was
        before, the last P_n where the segment closes; and what is there is contiguous.
        """
        k, width = self.recipe.sensory, read.tokens.shape[1]
        ids = jnp.concatenate([recent[:, recent.shape[1] - k :], read.tokens], axis=1)
        sensory, tokens = jnp.split(self._lookup(ids), [k], axis=1)
        prompt = prompt.astype(tokens.dtype)[:, None]
        before = jnp.concatenate([prompt, sensory], axis=1)
        before = jnp.where(
            known[:, None, None], before, jnp.roll(before, -1, axis=1)
        )  # P_0 next to the tokens
        there = read.opens[:, None] & (known[:, None] | (jnp.arange(k + 1) == k))
        place, count = jnp.arange(width + 1), read.count[:, None]
        last = place == count
        tokens = jnp.where(last[..., None], prompt, jnp.pad(tokens, ((0, 0), (0, 1), (0, 0))))
        used = (place < count) | (last & read.closes[:, None])
        return jnp.concatenate([before, tokens], axis=1), jnp.concatenate([there, used], axis=1)

    def _split(
        self, hidden: Float[Array, "B n D"], read: Part
    ) -> tuple[Float[Array, "B W D"], Float[Array, "B D"]]:
        """Of :meth:`_slots`: the hidden states of the tokens, and that of the last P_n."""
        tokens = hidden[:, self.recipe.sensory + 1 :]
        memory = jnp.take_along_axis(tokens, read.count[:, None, None], axis=1)[:, 0]
        return tokens[:, :-1], memory

    def _summary(self, carry: State, read: Part) -> Float[Array, "B D"] | None:
        """s_n of the segments that open, if any of them can recall something."""
        if self.recipe.recall != "attention":
            return None
        asking = (read.opens & (carry["queue"]["count"] > 0)).any()
        single = "layers" in carry and read.tokens.shape[1] == 1 < self.recipe.summarised
        asked = self._asked(read, carry["recent"], single)
        none = jnp.zeros((len(read.count), self.config.d_model), self.config.dtype)
        return jax.lax.cond(asking, lambda: self._summarise(*asked), lambda: none)

    def _summaries(self, recent: Int[Array, "B R"], parts: Part) -> Float[Array, "N B D"]:
        """s_n of every step, in one call."""
        steps, batch = parts.count.shape
        _, recents = jax.lax.scan(lambda recent, read: (remember(recent, read), recent), recent, parts)
        asked = self._asked(parts, recents, False)
        # Rows of the batch outermost: over them it is sharded.
        flat = (jnp.moveaxis(a, 0, 1).reshape(batch * steps, *a.shape[2:]) for a in asked)
        summarise = jax.checkpoint(self._summarise) if self.recipe.remat else self._summarise
        return jnp.moveaxis(summarise(*flat).reshape(batch, steps, -1), 1, 0)

    def _asked(
        self, read: Part, recent: Int[Array, "*N B R"], single: bool
    ) -> tuple[Int[Array, "*N B j"], Int[Array, "*N B"]]:
        """The tokens that a query is made of, and how many of them count."""
        j = self.recipe.summarised
        if single or self.recipe.query == "previous":
            return recent[..., recent.shape[-1] - j :], jnp.full_like(read.count, j)
        return read.tokens[..., :j], jnp.minimum(read.count, j)

    def _summarise(self, ids: Int[Array, "B j"], count: Int[Array, " B"]) -> Float[Array, "B D"]:
        """``F([T ; ids ; T])`` at the last slot, of the first ``count`` ids."""
        tokens = self._lookup(ids)
        topic = spmd.replicate(self.memory.topic[...]).astype(tokens.dtype)
        x, place = jnp.pad(tokens, ((0, 0), (1, 1), (0, 0))), jnp.arange(ids.shape[1] + 2)
        last = count[:, None] + 1
        x = jnp.where(((place == 0) | (place == last))[..., None], topic, x)
        hidden, _ = self._backbone(x, place <= last)
        return jnp.take_along_axis(hidden, last[..., None], axis=1)[:, 0]

    def _lookup(self, ids: Int[Array, "B n"]) -> Float[Array, "B n D"]:
        return self.embed.lookup(ids, jnp.dtype(self.config.dtype))

    def _backbone(
        self,
        x: Float[Array, "B n D"],
        used: Bool[Array, "B n"],
        filled: Int[Array, " B"] | None = None,
        segment: Int[Array, " B"] | None = None,
        state: State | None = None,
    ) -> tuple[Float[Array, "B n D"], State | None]:
        """F of embeddings without positions, where ``used``; the last norm's output, and F's state.

        Args:
            filled: slots of the segment so far.
            segment: id of the segment that the slots belong to.
            state: ``layers`` and the id of the ``segment`` they are of, to go on from.
        """
        batch, length, _ = x.shape
        whole = -length % spmd.sequence_parts()  # time that the devices divide
        x, used = jnp.pad(x, ((0, 0), (0, whole), (0, 0))), jnp.pad(used, ((0, 0), (0, whole)))
        start = jnp.zeros(batch, jnp.int32) if filled is None else filled
        positions = jnp.maximum(start[:, None] + jnp.cumsum(used, axis=1, dtype=jnp.int32) - 1, 0)
        ids = jnp.ones(batch, jnp.int32) if segment is None else segment
        ctx = Context.create(
            batch,
            length + whole,
            positions=positions,
            segment_ids=jnp.where(used, ids[:, None], 0),
            previous_segment=None if state is None else state["segment"],
            sequence_axis=spmd.SEQUENCE if spmd.sequence_parts() > 1 else None,
        )
        ctx = jax.tree.map(spmd.replicate_time, ctx)
        x = self.embed.at(x, ctx.positions).astype(self.config.residual_dtype)
        x, layers = self.backbone(spmd.shard_activations(x), None if state is None else state["layers"], ctx)
        return self.norm(x, dtype=jnp.dtype(self.config.dtype))[:, :length], layers

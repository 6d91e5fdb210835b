"""The long-term memory of HMT: a queue of segment memories, searched by one query (arXiv:2405.06067, 3.3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from layers.param import Linear, normal, param
from models.hmt_config import HMTConfig
from pallas_kernels import spmd

Queue = dict[str, Any]  # "memories" float32 [B, Nq, D] and "count" int32 [B], of the document under way


class Memory(nnx.Module):
    """What HMT adds to a backbone: T, P_0, W_q and W_k, 2 d + 2 d h parameters.

    Memory number n of a document lies in slot n % Nq of its queue. There is no value and no output
    projection: what is recalled is a weighted mean of memories.
    """

    def __init__(self, config: HMTConfig, *, rngs: nnx.Rngs):
        width, memory = config.d_model, config.memory
        self.size, self.recall_dim = memory.queue, memory.recall_dim or width
        std = memory.init_std or config.init_std or 0.02
        draw = lambda: param(normal(std)(rngs.params(), (width,)), ("embed",), "vector")  # noqa: E731
        self.topic, self.prompt = draw(), draw()
        self.wq = Linear(width, self.recall_dim, ("embed", None), rngs=rngs)
        self.wk = Linear(width, self.recall_dim, ("embed", None), rngs=rngs)

    def init_queue(self, batch: int) -> Queue:
        """No memory yet."""
        zeros = jnp.zeros((batch, self.size, self.topic[...].shape[0]), jnp.float32)
        return {"memories": zeros, "count": jnp.zeros(batch, jnp.int32)}

    def first(self, batch: int) -> Float[Array, "B D"]:
        """P_0 for every row, float32."""
        prompt = spmd.replicate(self.prompt[...]).astype(jnp.float32)
        return jnp.broadcast_to(prompt, (batch, len(prompt)))

    def recall(
        self, summary: Float[Array, "B D"], queue: Queue
    ) -> tuple[Float[Array, "B D"], Float[Array, "B Nq"]]:
        """``P = w Q`` and ``w = softmax(s W_q (Q W_k)^T / sqrt(h))``, float32; without memories P_0 and 0."""
        memories, count = queue["memories"], queue["count"]
        asked, keys = self.wq(summary.astype(jnp.float32)), self.wk(memories)
        scores = jnp.einsum("bh,bqh->bq", asked, keys) * self.recall_dim**-0.5
        kept = jnp.arange(self.size) < count[:, None]
        weights = jnp.where(kept, jax.nn.softmax(jnp.where(kept, scores, -1e30), axis=-1), 0)
        return self._or_first(jnp.einsum("bq,bqd->bd", weights, memories), count), weights

    def last(self, queue: Queue) -> Float[Array, "B D"]:
        """The newest memory; P_0 without one."""
        memories, count = queue["memories"], queue["count"]
        newest = jnp.take_along_axis(memories, (jnp.maximum(count - 1, 0) % self.size)[:, None, None], axis=1)
        return self._or_first(newest[:, 0], count)

    def push(self, queue: Queue, memory: Float[Array, "B D"], where: Bool[Array, " B"]) -> Queue:
        """``queue`` with ``memory`` in the rows ``where``, in place of the oldest if it is full."""
        slot = jnp.where(where, queue["count"] % self.size, self.size)
        here = (jnp.arange(self.size) == slot[:, None])[..., None]
        memories = jnp.where(here, memory.astype(jnp.float32)[:, None], queue["memories"])
        return {"memories": memories, "count": queue["count"] + where}

    def _or_first(self, prompt: Float[Array, "B D"], count: Array) -> Float[Array, "B D"]:
        return jnp.where(count[:, None] > 0, prompt, self.first(len(count)))


def forget(queue: Queue, where: Bool[Array, " B"]) -> Queue:
    """``queue`` without any memory in the rows ``where``."""
    return {**queue, "count": jnp.where(where, 0, queue["count"])}


def detach(queue: Queue, when: Bool[Array, ""]) -> Queue:
    """``queue``, through whose memories no gradient passes ``when`` it is so."""
    memories = queue["memories"]
    return {**queue, "memories": jnp.where(when, jax.lax.stop_gradient(memories), memories)}

"""Language modelling with a hierarchical memory: the loss goes through all segments of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from configs.hmt import HMTExperiment
from models.loss import chunked_cross_entropy
from objectives.language import LanguageModelling
from objectives.types import Carry, LossAndMore


class MemoryLanguageModelling(LanguageModelling):
    """`LanguageModelling` of a `models.hmt.HMT`.

    Training reads rows in a fixed number of steps (``model.memory.documents``). Where documents begin within
    rows that may not reach the end of one: the targets there are left out, and ``left_out`` is their share.
    Evaluation reads all of everything.
    """

    config: HMTExperiment

    def loss(self, model: Any, batch: Mapping[str, Any], carry: Carry, key: jax.Array) -> LossAndMore:
        """Nats per target (of the last segments, if ``loss_segments``), and ``model.z_loss`` as in an LM."""
        c = self.config
        hidden, carry, out = model(
            batch["tokens"],
            carry,
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            training=True,
        )
        hidden = jnp.where(out["read"][..., None], hidden, 0)
        weights = batch["weights"] * out["read"]
        if c.loss_segments is not None:
            weights = last_targets(weights, c.loss_segments * c.model.memory.segment)
        nll, log_z = chunked_cross_entropy(model, hidden, batch["targets"], c.model.loss_chunks)
        metrics = self.task.metrics({"nll": nll}, {**batch, "weights": weights})
        total, weight = metrics.pop("loss")
        if c.task.packing != "stream":
            given = jnp.sum(batch["weights"])
            metrics["left_out"] = (given - jnp.sum(batch["weights"] * out["read"]), given)
        square_log_z = jnp.sum(jnp.square(log_z) * weights)
        return (total + c.model.z_loss * square_log_z, weight), (carry, metrics)


def last_targets(weights: Float[Array, "B L"], count: int) -> Float[Array, "B L"]:
    """``weights`` of the last ``count`` targets of each row that have any, and 0 for those before."""
    number = jnp.cumsum((weights > 0)[:, ::-1], axis=1)[:, ::-1]
    return jnp.where(number <= count, weights, 0)

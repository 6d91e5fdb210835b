"""Language modelling with beacons: ratios are drawn for every batch, and all windows learn at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from configs.beacon import BeaconExperiment
from models.loss import chunked_cross_entropy
from objectives.language import LanguageModelling
from objectives.types import Carry, LossAndMore


class BeaconModelling(LanguageModelling):
    """`LanguageModelling` of a `models.beacon.BeaconLM`: evaluation as it is, training at drawn ratios."""

    config: BeaconExperiment

    def loss(self, model: Any, batch: Mapping[str, Any], carry: Carry, key: jax.Array) -> LossAndMore:
        """Nats per target, and ``model.z_loss`` as in an LM; "beacons_per_token" shows the ratios drawn.

        The targets of first windows count unless ``model.beacon.first_window_loss`` is False.
        """
        c = self.config.model
        hidden, _, out = model(
            batch["tokens"], segment_ids=batch["segment_ids"], key=key, deterministic=False
        )
        nll, log_z = chunked_cross_entropy(model, hidden, batch["targets"], c.loss_chunks)
        slots, weights = out["slots"], batch["weights"]
        if not c.beacon.first_window_loss:
            weights = jnp.where(slots.window[:, : slots.raw] > 0, weights, 0)
        metrics = self.task.metrics({"nll": nll}, {**batch, "weights": weights})
        total, weight = metrics.pop("loss")
        there = slots.segment_ids != 0
        metrics["beacons_per_token"] = there[:, slots.raw :].sum(), there[:, : slots.raw].sum()
        square_log_z = jnp.sum(jnp.square(log_z) * weights)
        return (total + c.z_loss * square_log_z, weight), (carry, metrics)

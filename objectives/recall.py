"""Recall: the decoder LM on generated rows; nats per answer in training, accuracy on held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from configs.recall import RecallExperiment
from models.loss import chunked_cross_entropy, chunked_hits, token_nll
from objectives.language import check_groups
from objectives.types import Carry, LossAndMore
from runtime import mesh as meshes
from tasks.recall import RecallTask
from tasks.types import Mean


class Recall:
    """An `objectives.types.Objective`; nothing is carried from batch to batch.

    Raises ValueError: rows that the law cannot make, that have more ids or are longer than the model, or that
    the mesh does not divide.
    """

    def __init__(self, config: RecallExperiment, mesh: jax.sharding.Mesh):
        self.config, self.task = config, RecallTask(config.task)
        layout, accumulation = config.mesh.sequence_layout, config.optim.accumulation
        lengths = {}
        for prefix, (rows, length) in self.task.shapes.items():
            parts = 1 if prefix.startswith("eval") else accumulation
            meshes.check_batch(mesh, rows, length, parts, prefix=prefix, layout=layout)
            lengths[prefix] = length
            if (config.model.longest or length) < length:
                raise ValueError(
                    f"model.max_positions={config.model.longest}, but task.{prefix.rstrip('.')} has rows of "
                    f"{length} tokens; set it to at least {length}"
                )
        if "c" in config.model.layers:
            check_groups(config, mesh, lengths)
        if self.task.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={config.model.vocab_size}, but task.{config.task.name} has ids up to "
                f"{self.task.vocab_size - 1}; set it to at least {self.task.vocab_size}"
            )
        self.tokens_per_step = self.task.tokens_per_step

    def loss(self, model: Any, batch: Mapping[str, Any], carry: Carry, key: jax.Array) -> LossAndMore:
        """Nats per target, and ``model.z_loss`` times the squared log-normaliser."""
        c = self.config
        nll, log_z, _ = token_nll(model, batch, None, c.model.loss_chunks, c.mesh.sequence_layout)
        total, weight = self.task.loss({"nll": nll}, batch)
        square_log_z = jnp.sum(jnp.square(log_z) * batch["weights"])
        return (total + c.model.z_loss * square_log_z, weight), (carry, {})

    def metrics(self, model: Any, batch: Mapping[str, Any], carry: Carry) -> dict[str, Mean]:
        """Accuracy too, which takes the logits a second time."""
        c = self.config
        hidden, _, _ = model(
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            sequence_layout=c.mesh.sequence_layout,
        )
        nll, _ = chunked_cross_entropy(model, hidden, batch["targets"], c.model.loss_chunks)
        hits = chunked_hits(model, hidden, batch["targets"], c.model.loss_chunks)
        return self.task.metrics({"nll": nll, "hits": hits}, batch)

    def init_carry(self, model: Any) -> Carry:
        """Nothing."""
        return None

    def carry_axes(self, model: Any) -> Any:
        """Of nothing."""
        return 0

    def flops_per_step(self, model: Any) -> float:
        """Averaged over the lengths of training rows, padding included."""
        shares = self.task.length_shares
        per_token = sum(share * model.flops_per_token(length) for length, share in shares.items())
        return 3 * per_token * self.tokens_per_step

    def verdict(self, history: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """Ends the run at ``stop_accuracy``."""
        goal, found = self.config.stop_accuracy, history[-1]["validation/accuracy"]
        if goal is None or found < goal:
            return "", ""
        return "", f"validation accuracy {found:.4f} has reached stop_accuracy={goal:g}"

    def prepare(self, workdir: epath.Path) -> None:
        """Nothing to keep: rows are made again from the config."""

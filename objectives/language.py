"""Language modelling: the decoder LM on token batches, its mixer states carried on where asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from configs.base import Experiment
from models.loss import chunked_cross_entropy, chunked_hits, token_nll
from objectives.types import Carry, LossAndMore
from runtime import mesh as meshes
from tasks.lm import LMTask
from tasks.types import Mean


class LanguageModelling:
    """An `objectives.types.Objective`. Raises FileNotFoundError, ValueError: data that is missing, too
    little, or has more ids than the model; batches that the mesh does not divide."""

    def __init__(self, config: Experiment, mesh: jax.sharding.Mesh):
        task = config.task
        layout = config.mesh.sequence_layout
        meshes.check_batch(mesh, task.batch_size, task.seq_len, config.optim.accumulation, layout=layout)
        if task.mixture.objectives and config.kind != Experiment.kind:
            raise ValueError(
                f"task.mixture.objectives is for plain language models; a run of kind {config.kind!r} reads "
                "text as it is, leave it empty"
            )
        self.config, self.task = config, LMTask(task)
        self.tokens_per_step = task.batch_size * task.seq_len
        for prefix, shape in self.task.shapes.items():
            meshes.check_batch(mesh, *shape, prefix=prefix, layout=layout)
        if "c" in config.model.layers:
            lengths = {
                "": task.seq_len,
                **{prefix: length for prefix, (_, length) in self.task.shapes.items()},
            }
            check_groups(config, mesh, lengths)
        if self.task.vocab_size > config.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={config.model.vocab_size}, but task.source has ids up to "
                f"{self.task.vocab_size - 1}; set it to at least {self.task.vocab_size}"
            )

    def loss(self, model: Any, batch: Mapping[str, Any], carry: Carry, key: jax.Array) -> LossAndMore:
        """Nats per target, and ``model.z_loss`` times the squared log-normaliser."""
        chunks, layout = self.config.model.loss_chunks, self.config.mesh.sequence_layout
        nll, log_z, carry = token_nll(model, batch, carry, chunks, layout)
        metrics = self.task.metrics({"nll": nll}, batch)
        total, weight = metrics.pop("loss")
        square_log_z = jnp.sum(jnp.square(log_z) * batch["weights"])
        return (total + self.config.model.z_loss * square_log_z, weight), (carry, metrics)

    def metrics(self, model: Any, batch: Mapping[str, Any], carry: Carry) -> dict[str, Mean]:
        """From an empty state, whatever is carried in training."""
        chunks, layout = self.config.model.loss_chunks, self.config.mesh.sequence_layout
        if "marks" in batch and self.task.haystack is not None:
            return self._answer_metrics(model, batch, chunks)
        nll, _, _ = token_nll(model, batch, chunks=chunks, sequence_layout=layout)
        return self.task.metrics({"nll": nll}, batch)

    def _answer_metrics(self, model: Any, batch: Mapping[str, Any], chunks: int) -> dict[str, Mean]:
        """With which targets are the most likely tokens."""
        hidden, _, _ = model(
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
            sequence_layout=self.config.mesh.sequence_layout,
        )
        nll, _ = chunked_cross_entropy(model, hidden, batch["targets"], chunks)
        hits = chunked_hits(model, hidden, batch["targets"], chunks)
        return self.task.metrics({"nll": nll, "hits": hits}, batch)

    def init_carry(self, model: Any) -> Carry:
        """The mixers' empty states with ``task.carry_state``, else None."""
        if not self.config.task.carry_state:
            return None
        # A window bounds what attention can carry (Experiment.validate); other mixers ignore max_len.
        return model.init_state(self.config.task.batch_size, self.config.model.attention.window or 1)

    def carry_axes(self, model: Any) -> Any:
        """Every array of a model's state counts rows first."""
        return 0

    def flops_per_step(self, model: Any) -> float:
        """Averaged over the lengths that rows of training batches have."""
        shares = self.task.length_shares
        per_token = sum(share * model.flops_per_token(length) for length, share in shares.items())
        return 3 * per_token * self.tokens_per_step

    def verdict(self, history: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """Never any; odds that follow rewards learn here."""
        if self.task.mixture is not None:
            self.task.mixture.observe(history)
        return "", ""

    def prepare(self, workdir: epath.Path) -> None:
        """Copies the tokenizer; odds that follow rewards take in what the run has recorded."""
        self.task.save_tokenizer(workdir)
        if self.task.mixture is not None and self.task.mixture.rewarded is not None:
            self.task.mixture.rewarded.read(workdir / "metrics.jsonl")


def check_groups(config: Any, mesh: jax.sharding.Mesh, lengths: Mapping[str, int]) -> None:
    """Raises ValueError, naming the field, unless groups of CCA fit into what a device has of time."""
    group, parts, layout = config.model.cca.group_size, mesh.shape["sequence"], config.mesh.sequence_layout
    unit = group * parts * meshes.PIECES[layout]
    for prefix, length in lengths.items():
        if parts > 1 and length % unit:
            raise ValueError(
                f"task.{prefix}seq_len={length} must be a multiple of {unit} = model.cca.group_size {group} "
                f"x mesh.sequence {parts} x {meshes.PIECES[layout]} (mesh.sequence_layout={layout!r}); "
                f"{-(-length // unit) * unit} would work, or another group_size"
            )

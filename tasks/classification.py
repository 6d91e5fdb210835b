"""Classification of sequences by the Long Range Arena's protocol: accuracy over every example."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tasks import denoising, lra
from tasks.liftoff import Chance
from tasks.lra.config import LRADataConfig
from tasks.lra.types import Examples
from tasks.packing import ENDLESS, row_range
from tasks.types import Batch, Mean, weighted_sum

LEVELS = 256  # grey levels that a hidden pixel may have


@dataclasses.dataclass
class ClassificationTaskConfig:
    """A data set of the Long Range Arena, in batches.

    Attributes:
        data: which data set; see `tasks.lra.config.LRADataConfig`.
        batch_size: B, of the global batch; ``eval_batch_size`` of held-out batches, None for the same.
        seed: of the order of examples, and of what is hidden.
        eval_splits: held-out sets, each evaluated whole. Published numbers are of "test" at the step where
            "validation" is best.
        eval_batches: at most this many batches of each; None: all.
        pretrain: "" for labels; "masked" or "causal" to tell hidden, or next, tokens of the training inputs
            instead ("Never Train from Scratch", arXiv:2310.02980).
        mask_rate: share of the tokens that "masked" hides.
        mask_channel: continuous inputs have a last channel that marks hidden tokens, all 0 without
            pretraining; a model to be fine-tuned and its counterpart from scratch both need it.
    """

    data: LRADataConfig = dataclasses.field(default_factory=LRADataConfig)
    batch_size: int = 32
    eval_batch_size: int | None = None
    seed: int = 0
    eval_splits: tuple[str, ...] = ("validation", "test")
    eval_batches: int | None = None
    pretrain: str = ""
    mask_rate: float = 0.5
    mask_channel: bool = False


class ClassificationTask:
    """Labels, or hidden tokens, of whole sequences; a `tasks.types.Task`.

    A batch holds ``inputs`` (ids int32 [B, L], pairs [B, 2, L], or numbers float32 [B, L, C]), ``lengths``
    where some sequences are shorter than L, and ``labels`` int32 [B] with ``weights`` float32 [B]; or
    ``targets`` int32 [B, L] with ``weights`` [B, L] when pretraining.

    Attributes:
        data: the `tasks.lra.types.LRAData`.
        eval_shape: (B, L) of held-out batches.
        model_fields: fields of a classifier's config, and the values that fit the data.

    Raises:
        FileNotFoundError, ValueError: from the data set, or a field that cannot work.
    """

    def __init__(self, config: ClassificationTaskConfig):
        _validate(config)
        self.config, self.data = config, lra.load(config.data)
        self.eval_shape = (config.eval_batch_size or config.batch_size, self.data.seq_len)
        for split in ("train", *config.eval_splits):
            if not len(self.data.splits[split]):
                raise ValueError(f"task.data.name={self.data.name!r} has no examples in its split {split!r}")
        if config.mask_channel and self.data.vocab_size is not None:
            raise ValueError("task.mask_channel=True is for continuous inputs; ids have one id that hides")
        self._levels: Mapping[str, Examples] = {}
        if config.pretrain:
            self._prepare_pretraining()

    def _prepare_pretraining(self) -> None:
        if self.data.pairs:
            raise ValueError("task.pretrain reads single sequences; pairs are not offered")
        if self.data.vocab_size is None:
            if self.config.pretrain == denoising.MASKED and not self.config.mask_channel:
                raise ValueError("task.pretrain='masked' of continuous inputs needs task.mask_channel=True")
            self._levels = lra.load(dataclasses.replace(self.config.data, continuous=False)).splits
        elif self.config.pretrain == denoising.MASKED and self.data.mask_id is None:
            raise ValueError(
                f"task.pretrain='masked': {self.data.name!r} has no id that hides a token; set "
                "task.data.continuous=True for images, or task.pretrain='causal'"
            )

    @property
    def vocab_size(self) -> int:
        """Number of ids, 0 for continuous inputs."""
        return self.data.vocab_size or 0

    @property
    def model_fields(self) -> dict[str, Any]:
        """What the data fix of the model's config, by field."""
        continuous, pretrain = self.data.vocab_size is None, bool(self.config.pretrain)
        fields = {
            "classes": (self.data.vocab_size or LEVELS) if pretrain else self.data.classes,
            "vocab_size": self.data.vocab_size,
            "pair": self.data.pairs,
            "head": "tokens" if pretrain else "classes",
        }
        if continuous:
            fields["channels"] = self.data.channels + self.config.mask_channel
        return fields

    @property
    def steps_per_epoch(self) -> float:
        """Training steps that see every example once."""
        return len(self.data.splits["train"]) / self.config.batch_size

    def train(self, rows: slice | None = None) -> grain.MapDataset:
        """``dataset[s]`` is batch s, or its rows ``rows``: every example once an epoch, reshuffled."""
        size, count = self.config.batch_size, len(self.data.splits["train"])
        start, stop = row_range(rows, size)

        def batch(step: int) -> dict[str, np.ndarray]:
            number = int(step) * size + np.arange(start, stop)
            indices = np.empty(len(number), np.int64)
            for epoch in np.unique(number // count):
                of_epoch = number // count == epoch
                order = np.random.default_rng((self.config.seed, int(epoch))).permutation(count)
                indices[of_epoch] = order[number[of_epoch] % count]
            return self._batch("train", indices, number, number >= 0)

        return grain.MapDataset.range(ENDLESS).map(batch)

    def eval_sets(self, rows: slice | None = None) -> dict[str, grain.MapDataset]:
        """Each split whole, in its own order; the last batch is filled up with weight 0."""
        return {split: self._eval_set(split, rows) for split in self.config.eval_splits}

    def _eval_set(self, split: str, rows: slice | None) -> grain.MapDataset:
        size, count = self.eval_shape[0], len(self.data.splits[split])
        start, stop = row_range(rows, size)
        length = math.ceil(count / size)

        def batch(step: int) -> dict[str, np.ndarray]:
            number = int(step) * size + np.arange(start, stop)
            return self._batch(split, np.minimum(number, count - 1), number, number < count)

        return grain.MapDataset.range(min(length, self.config.eval_batches or length)).map(batch)

    def _batch(
        self, split: str, indices: Int[np.ndarray, " n"], numbers: np.ndarray, real: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Examples ``indices``; those not ``real`` weigh nothing. ``numbers`` count rows over all batches."""
        found = self.data.splits[split].batch(indices)
        inputs, lengths = found.get("inputs", found.get("tokens")), found["lengths"]
        assert inputs is not None
        if self.config.pretrain:
            batch = self._hide(split, indices, numbers, inputs, lengths)
            batch["weights"] *= real[:, None]
        else:
            batch = {
                "inputs": self._with_channel(inputs),
                "labels": found["labels"],
                "weights": real.astype(np.float32),
            }
        return batch if self.data.mask_id is None else {**batch, "lengths": lengths}

    def _hide(
        self, split: str, indices: np.ndarray, numbers: np.ndarray, inputs: np.ndarray, lengths: np.ndarray
    ) -> dict[str, np.ndarray]:
        config = self.config
        tokens = self._levels[split].batch(indices)["tokens"] if self._levels else inputs
        if config.pretrain == denoising.CAUSAL:
            return denoising.next_tokens(self._with_channel(inputs), tokens, lengths)
        # Held-out batches hide the same tokens at every evaluation, whatever the seed of the run.
        hiding = denoising.Hiding(config.mask_rate, config.seed if split == "train" else 0, numbers)
        if self._levels:
            return denoising.masked_numbers(inputs, tokens, lengths, hiding)
        assert self.data.mask_id is not None
        return denoising.masked_tokens(tokens, lengths, self.data.mask_id, hiding)

    def _with_channel(self, inputs: np.ndarray) -> np.ndarray:
        """With the channel that marks hidden inputs, where there is one, marking none."""
        if not self.config.mask_channel:
            return inputs
        return np.concatenate([inputs, np.zeros_like(inputs[..., :1])], axis=-1)

    def chance(self, split: str) -> Chance:
        """What the majority class of a held-out set scores, over the batches of it that are evaluated."""
        size, examples = self.eval_shape[0], self.data.splits[split]
        count = min(len(examples), size * (self.config.eval_batches or len(examples)))
        found = np.zeros(self.data.classes, np.int64)
        for start in range(0, count, 256):
            labels = examples.batch(np.arange(start, min(start + 256, count)))["labels"]
            found += np.bincount(labels, minlength=len(found))
        return Chance(float(found.max() / count), count)

    def loss(self, output: Mapping[str, Array], batch: Batch) -> Mean:
        """(sum of nats, number of labels or hidden tokens), from ``output["logits"]`` [B, .., classes]."""
        answers = jnp.asarray(batch["targets" if self.config.pretrain else "labels"])
        log_p = jax.nn.log_softmax(output["logits"])
        nll = -jnp.take_along_axis(log_p, answers[..., None], axis=-1)[..., 0]
        return weighted_sum(nll, jnp.asarray(batch["weights"]))

    def metrics(self, output: Mapping[str, Array], batch: Batch) -> dict[str, Mean]:
        """``loss`` in nats, and ``accuracy``: the share of labels, or of hidden tokens, that are told."""
        answers = jnp.asarray(batch["targets" if self.config.pretrain else "labels"])
        right = (jnp.argmax(output["logits"], axis=-1) == answers).astype(jnp.float32)
        return {
            "loss": self.loss(output, batch),
            "accuracy": weighted_sum(right, jnp.asarray(batch["weights"])),
        }


def _validate(config: ClassificationTaskConfig) -> None:
    try:
        config.data.validate()
    except ValueError as error:
        raise ValueError(f"task.data.{error}") from error
    if config.pretrain not in ("", denoising.MASKED, denoising.CAUSAL):
        raise ValueError(f"task.pretrain={config.pretrain!r} is unknown; use 'masked', 'causal' or ''")
    if not 0 < config.mask_rate < 1:
        raise ValueError(f"task.mask_rate={config.mask_rate} must be above 0 and below 1")
    if config.eval_batches is not None and config.eval_batches < 1:
        raise ValueError(f"task.eval_batches must be at least 1, or None for all, got {config.eval_batches}")
    unknown = set(config.eval_splits) - set(lra.SPLITS)
    if unknown or "validation" not in config.eval_splits:
        raise ValueError(
            f"task.eval_splits={config.eval_splits} must hold 'validation', and may hold 'test' and 'train'"
        )

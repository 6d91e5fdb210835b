"""Language modelling: predict the next byte or token of real text."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.

import dataclasses
import math
from collections.abc import Mapping

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array

from tasks import bpe, sources
from tasks.buckets import BucketPacker, Curriculum
from tasks.haystack.config import HaystackConfig
from tasks.haystack.rows import HaystackRows, answer_metrics
from tasks.mixture import Mixture, MixtureConfig
from tasks.packing import Layout, Packer
from tasks.prepared import Prepared
from tasks.token_arrays import check_ids
from tasks.tokenizer import ByteTokenizer, Tokenizer
from tasks.types import Batch, Mean, weighted_sum


@dataclasses.dataclass
class LMTaskConfig(sources.SourceConfig):
    """Language modelling on a source (`tasks.sources.SourceConfig` has its fields).

    Attributes:
        seq_len, batch_size: L and B, of the global batch.
        packing: "docs" or "stream", see `tasks.packing.Layout`; or "buckets", see `tasks.buckets`: rows of
            one length a batch, from ``shortest_seq_len`` to ``seq_len``, and more of them where they are
            shorter. Validation is then as with "docs".
        shortest_seq_len, curriculum, curriculum_cycles: of "buckets"; see `tasks.buckets.Curriculum`.
        carry_state: row r of batch s + 1 continues row r of batch s (truncated backpropagation).
        seed: of the data order.
        eval_seq_len, eval_batch_size: for validation; None: as in training.
        eval_batches: at most this many validation batches; None: all.
        haystack: rows of needles in text instead of text; see `tasks.haystack.config`.
        mixture: objectives besides the next token, and masked input, in training; see `tasks.mixture`.
    """

    seq_len: int = 256
    batch_size: int = 8
    packing: str = "docs"
    shortest_seq_len: int = 64
    curriculum: str = "grow_p2"
    curriculum_cycles: int = 8
    carry_state: bool = False
    seed: int = 0
    eval_seq_len: int | None = None
    eval_batch_size: int | None = None
    eval_batches: int | None = None
    haystack: HaystackConfig = dataclasses.field(default_factory=HaystackConfig)
    mixture: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)


class LMTask:
    """Next-token prediction with document-aware packing; a `tasks.types.Task`.

    ``training`` and ``validation`` are the corpora, ``manifest`` the files of a byte source (else None),
    ``tokenizer`` turns text into ids (None for token arrays); ``eval_shape`` is (B, L) of validation batches.
    ``byte_lengths`` int32 [V] holds the bytes that each token stands for, where that is known exactly, and
    ``bytes_per_token`` their mean, where only that is. ``haystack`` makes rows of needles in text.

    Raises:
        FileNotFoundError, ValueError: from the source, the layout, or a corpus below one batch.
    """

    def __init__(self, config: LMTaskConfig):
        self.config = config
        layout = Layout(config.batch_size, config.seq_len, config.packing, config.carry_state)
        eval_layout = dataclasses.replace(
            layout,
            batch_size=config.batch_size if config.eval_batch_size is None else config.eval_batch_size,
            seq_len=config.seq_len if config.eval_seq_len is None else config.eval_seq_len,
            packing="docs" if config.packing == "buckets" else config.packing,
            carry_state=False,  # every validation batch is evaluated from an empty state
        )
        self.eval_shape = (eval_layout.batch_size, eval_layout.seq_len)
        if config.eval_batches is not None and config.eval_batches < 1:
            raise ValueError(
                f"task.eval_batches must be at least 1, or None for all, got {config.eval_batches}"
            )
        splits = sources.load(config)
        self.training, self.validation, self.manifest = splits.train, splits.validation, splits.manifest
        self._vocab_size = splits.vocab_size
        self._tokenizer_file: epath.Path | None = None
        self.tokenizer: Tokenizer | None = ByteTokenizer() if splits.manifest else None
        self.byte_lengths = _lengths_of_bytes() if splits.manifest else None
        self.bytes_per_token = config.bytes_per_token
        if splits.prepared:
            self._open_tokenizer(splits.prepared)
        needed = config.batch_size * config.seq_len
        if self.training.targets < needed:
            raise ValueError(
                f"task.source={config.source!r} has {self.training.targets} training targets, fewer than one "
                f"batch of task.batch_size={config.batch_size} x task.seq_len={config.seq_len} = {needed}: "
                "lower those, or raise task.max_train_tokens"
            )
        self._train: Packer | BucketPacker
        if config.packing == "buckets":
            curriculum = Curriculum(config.shortest_seq_len, config.curriculum, config.curriculum_cycles)
            self._train = BucketPacker(self.training, layout, curriculum, seed=config.seed)
        else:
            self._train = Packer(self.training, layout, seed=config.seed)
        # Its own fixed seed: validation is the same whatever the seed of the run.
        self._eval = Packer(self.validation, eval_layout, seed=0, once=True)
        self.haystack = self._make_haystack() if config.haystack.share else None
        self.mixture = self._make_mixture() if config.mixture.added_ids else None

    @property
    def vocab_size(self) -> int:
        """Number of token ids; those of a mixture of objectives follow those of the text."""
        return self._vocab_size + self.config.mixture.added_ids

    @property
    def steps_per_epoch(self) -> int:
        """Training steps that see every target once."""
        return self._train.steps_per_epoch

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(B, L) of validation and of the shortest training rows, by prefix of the fields that set them."""
        shapes = {"eval_": self.eval_shape}
        if self.config.packing == "buckets":
            shapes["shortest_"] = (self.config.batch_size, self.config.shortest_seq_len)
        return shapes

    @property
    def length_shares(self) -> dict[int, float]:
        """Share of the training steps by the length of their rows."""
        return self._train.length_shares

    def train(self, rows: slice | None = None) -> grain.MapDataset:
        """``dataset[s]`` is batch s (`tasks.types.token_batch_spec`), or its rows ``rows``; s >= 0."""
        batches = self._train.dataset(rows)
        if self.haystack is not None:
            batches = self.haystack.into(batches, rows, self.config.batch_size)
        batches = self._checked(batches, "training")
        if self.mixture is not None:
            batches = self.mixture.into(batches, rows, self.config.batch_size)
        return batches

    def eval_sets(self, rows: slice | None = None) -> dict[str, grain.MapDataset]:
        """``{"validation": dataset}``: every held-out target exactly once (unless ``eval_batches``
        limits it), in a fixed shuffled order; padding has segment 0 and weight 0. Needles in text add
        ``haystack_LENGTH`` for each length, of answers alone; a mixture adds a set for each objective."""
        text = self._checked(self._eval.dataset(rows, self.config.eval_batches), "validation")
        needles = self.haystack.eval_sets(rows) if self.haystack is not None else {}
        mixed = self.mixture.eval_sets(text, rows, self.eval_shape[0]) if self.mixture is not None else {}
        return {"validation": text, **needles, **mixed}

    def loss(self, output: Mapping[str, Array], batch: Batch) -> Mean:
        """(sum of nats, number of targets), from ``output["nll"]`` float [B, L]: nats per target."""
        return weighted_sum(output["nll"], jnp.asarray(batch["weights"]))

    def metrics(self, output: Mapping[str, Array], batch: Batch) -> dict[str, Mean]:
        """``loss`` in nats per token and, where bytes are known, ``bits_per_byte``.

        The bytes are those that the targets stand for; the targets that end documents cost bits but are none.
        With planted facts, also ``answer_bits_DISTANCE``: bits per digit that was stated that many bytes
        before; `tasks.plant.CHANCE_BITS` for a model that does not remember. Needles in text add
        `tasks.haystack.rows.answer_metrics`.
        """
        nats, count = self.loss(output, batch)
        metrics = {"loss": (nats, count)}
        if "hits" in output:  # answers alone
            return metrics | answer_metrics(output, batch)
        if self.byte_lengths is not None:
            sizes = jnp.asarray(self.byte_lengths, jnp.float32)[jnp.asarray(batch["targets"])]
            metrics["bits_per_byte"] = (nats / math.log(2), jnp.sum(sizes * batch["weights"]))
        elif self.bytes_per_token is not None:
            metrics["bits_per_byte"] = (nats / math.log(2), count * self.bytes_per_token)
        for mark, distance in enumerate(self.config.plant.distances, 1):
            if "marks" in batch:
                asked = batch["weights"] * (jnp.asarray(batch["marks"]) == mark)
                nats, count = weighted_sum(output["nll"], asked)
                metrics[f"answer_bits_{distance}"] = (nats / math.log(2), count)
        if self.haystack is not None and "marks" in batch:
            metrics |= answer_metrics(output, batch)
        return metrics

    def save_tokenizer(self, workdir: epath.PathLike) -> None:
        """Copy the tokenizer.json of a prepared corpus into the directory of a run on it.

        Raises:
            ValueError: the run has another one, which its parameters belong to.
        """
        if self._tokenizer_file is None:
            return
        text, kept = self._tokenizer_file.read_text(), epath.Path(workdir) / bpe.FILE
        if not kept.exists() and jax.process_index() == 0:
            kept.parent.mkdir(parents=True, exist_ok=True)
            temporary = kept.parent / f".{kept.name}.tmp"
            temporary.write_text(text)
            temporary.replace(kept)  # other processes see it whole
        elif kept.exists() and kept.read_text() != text:
            raise ValueError(
                f"{kept} differs from {self._tokenizer_file}: the run was trained with another tokenizer; "
                "prepare the corpus with --tokenizer set to the former, or choose another --workdir"
            )

    def _make_haystack(self) -> HaystackRows:
        c = self.config
        for field, value in (("packing", "buckets"), ("carry_state", True)):
            if getattr(c, field) == value:
                raise ValueError(
                    f"task.{field}={value!r} does not go with task.haystack.share={c.haystack.share}: its "
                    "rows have one length and stand alone"
                )
        if c.plant.distances:
            raise ValueError("task.plant.distances and task.haystack.share are both set; use one of them")
        corpora = self.training, self.validation
        return HaystackRows(c.haystack, self.tokenizer, corpora, c.seq_len, self.eval_shape)

    def _make_mixture(self) -> Mixture:
        c = self.config
        held_out = self.eval_shape[1] if c.mixture.eval_batches else c.seq_len
        for field, found in (
            ("packing='buckets'", c.packing == "buckets"),
            ("carry_state=True", c.carry_state),
            ("plant.distances", c.plant.distances),
            ("haystack.share", c.haystack.share),
        ):
            if c.mixture.objectives and found:
                raise ValueError(
                    f"task.{field} does not go with task.mixture.objectives, which make rows of one length, "
                    "each a document of its own"
                )
        if self.byte_lengths is not None:
            self.byte_lengths = np.pad(self.byte_lengths, (0, c.mixture.added_ids))
        return Mixture(c.mixture, self._vocab_size, c.seq_len, min(held_out, c.seq_len))

    def _open_tokenizer(self, corpus: Prepared) -> None:
        self._tokenizer_file, self.tokenizer = corpus.tokenizer, ByteTokenizer()
        lengths: np.ndarray | None = _lengths_of_bytes()
        if corpus.tokenizer is not None:
            self.tokenizer = tokenizer = bpe.BPETokenizer(corpus.tokenizer)
            lengths = tokenizer.byte_lengths() if corpus.byte_exact else None
        self.byte_lengths, self.bytes_per_token = lengths, corpus.bytes_per_token

    def _checked(self, dataset: grain.MapDataset, name: str) -> grain.MapDataset:
        """Token arrays are too long to be checked whole: every batch made of them is."""
        if self.manifest is not None:
            return dataset

        def check(step: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            for field in ("tokens", "targets"):
                check_ids(batch[field], self._vocab_size, f"task.source: {name} batch {step} ({field})")
            return batch

        return dataset.map_with_index(check)


def _lengths_of_bytes() -> np.ndarray:
    """1 for every byte, 0 for the separator, int32 [257]."""
    return np.array([1] * 256 + [0], np.int32)

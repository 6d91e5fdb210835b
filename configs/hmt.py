"""An experiment on a language model with a hierarchical memory (`models.hmt.HMT`)."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
from typing import ClassVar

from configs.base import Experiment
from models.config import LMConfig
from models.hmt_config import HMTConfig, MemoryConfig

UNUSED_WITHOUT_RECALL = ("*memory/topic", "*memory/wq/*", "*memory/wk/*")
"""What ``model.memory.recall="attention"`` alone reads; frozen elsewhere, so that nothing decays it."""


@dataclasses.dataclass
class HMTExperiment(Experiment):
    """A run of `objectives.hmt.MemoryLanguageModelling`.

    Attributes:
        loss_segments: the loss is that of this many segments' worth of targets at the end of each row, and
            reaches the segments before through the memory alone (1 in the authors' code). None: all targets.
    """

    kind: ClassVar[str] = "hmt"

    model: HMTConfig = dataclasses.field(default_factory=HMTConfig)
    loss_segments: int | None = None

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        super().validate()
        task, memory = self.task, self.model.memory
        if self.loss_segments is not None and self.loss_segments < 1:
            raise ValueError(
                f"loss_segments={self.loss_segments} must be at least 1, or None for all targets"
            )
        if self.mesh.sequence_layout != "contiguous":
            raise ValueError(
                f"mesh.sequence_layout={self.mesh.sequence_layout!r} balances causal attention over a "
                "whole row; HMT reads it a segment at a time, use 'contiguous'"
            )
        if task.carry_state and (task.packing != "stream" or task.seq_len % memory.segment):
            raise ValueError(
                f"task.carry_state=True with HMT needs rows that end with a segment: task.packing='stream' "
                f"(found {task.packing!r}) and a multiple of model.memory.segment={memory.segment} for "
                f"task.seq_len (found {task.seq_len})"
            )
        if task.packing == "docs" and memory.documents == 1:
            raise ValueError(
                "task.packing='docs' lays several documents in a row, and model.memory.documents=1 has steps "
                "for one; raise that to how many a row is to hold, or use task.packing='stream'"
            )
        if task.seq_len <= memory.segment and not task.carry_state:
            raise ValueError(
                f"task.seq_len={task.seq_len} is not above model.memory.segment={memory.segment}: no row has "
                "a second segment that could remember the first; lengthen the rows or shorten the segment"
            )


def with_memory(config: Experiment, memory: MemoryConfig) -> HMTExperiment:
    """``config`` of a plain language model with a memory around it."""
    kept = {field.name: getattr(config, field.name) for field in dataclasses.fields(Experiment)}
    fields = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(LMConfig)}
    kept["model"] = HMTConfig(**fields, memory=memory)
    if memory.recall != "attention":
        frozen = (*config.train.freeze, *UNUSED_WITHOUT_RECALL)
        kept["train"] = dataclasses.replace(config.train, freeze=frozen)
    return HMTExperiment(**kept)

"""An experiment on labelled sequences: a classifier, a task of the Long Range Arena, and the loop."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
from typing import ClassVar

from configs.base import BaseExperiment
from models.config import ClassifierConfig
from tasks.classification import ClassificationTaskConfig
from tasks.liftoff import LiftoffConfig


@dataclasses.dataclass
class ClassificationExperiment(BaseExperiment):
    """A run of `objectives.classification.Classification`; ``liftoff`` says when it is given up at chance."""

    kind: ClassVar[str] = "classification"

    model: ClassifierConfig = dataclasses.field(default_factory=ClassifierConfig)
    task: ClassificationTaskConfig = dataclasses.field(default_factory=ClassificationTaskConfig)
    liftoff: LiftoffConfig = dataclasses.field(default_factory=LiftoffConfig)

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        self.model.validate()
        self.liftoff.validate()
        super().validate()
        if self.mesh.sequence_layout != "contiguous":
            raise ValueError(
                f"mesh.sequence_layout={self.mesh.sequence_layout!r} balances causal attention; a classifier "
                "reads whole sequences, use 'contiguous'"
            )

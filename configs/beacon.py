"""An experiment on a language model that condenses its past into beacons (`models.beacon.BeaconLM`)."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
from typing import ClassVar

from configs.base import Experiment, TrainConfig
from layers.beacon_ratios import BeaconConfig
from models.beacon_config import ADDED, BeaconLMConfig
from models.config import LMConfig


def _beacons_only() -> TrainConfig:
    return TrainConfig(unfreeze=ADDED)


@dataclasses.dataclass
class BeaconExperiment(Experiment):
    """A run of `objectives.beacon.BeaconModelling`.

    Started from a run of a plain language model (``init_from``), beacons begin as copies of its projections,
    and train alone unless ``train.unfreeze`` says otherwise.
    """

    kind: ClassVar[str] = "beacon"

    model: BeaconLMConfig = dataclasses.field(default_factory=BeaconLMConfig)
    train: TrainConfig = dataclasses.field(default_factory=_beacons_only)

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        super().validate()
        task, window = self.task, self.model.beacon.window
        if self.mesh.sequence_layout != "contiguous":
            raise ValueError(
                f"mesh.sequence_layout={self.mesh.sequence_layout!r} balances causal attention over a whole "
                "row; beacons condense it window by window, use 'contiguous'"
            )
        shortest = "shortest_seq_len" if task.packing == "buckets" else "seq_len"
        if getattr(task, shortest) <= window:
            raise ValueError(
                f"task.{shortest}={getattr(task, shortest)} is not above model.beacon.window={window}: in "
                "training a document's last window has no beacons, and such a row would be nothing else; "
                "lengthen the rows or shorten the window"
            )


def with_beacons(config: Experiment, beacon: BeaconConfig) -> BeaconExperiment:
    """``config`` of a plain language model with beacons added, which alone are trained."""
    kept = {field.name: getattr(config, field.name) for field in dataclasses.fields(Experiment)}
    fields = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(LMConfig)}
    kept["model"] = BeaconLMConfig(**fields, beacon=beacon)
    kept["train"] = dataclasses.replace(config.train, freeze=(), unfreeze=ADDED)
    return BeaconExperiment(**kept)

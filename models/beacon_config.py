"""The shape of a language model that condenses its past into beacons, as a config."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses

from layers.beacon_ratios import BeaconConfig
from models.config import LMConfig

ADDED = ("*beacon*",)
"""Patterns that match what the method adds to the parameters of a plain model, and nothing else."""


@dataclasses.dataclass
class BeaconLMConfig(LMConfig):
    """Shape of a decoder language model of attention and MLPs, and how its past is condensed."""

    pattern: str = "(*-)4"
    beacon: BeaconConfig = dataclasses.field(default_factory=BeaconConfig)

    @property
    def beacon_init_id(self) -> int:
        """The id whose embedding that of the beacon starts as."""
        return self.vocab_size - 1 if self.beacon.init_id is None else self.beacon.init_id

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        super().validate()
        attention = self.attention
        others = sorted(set(self.layers) - set("*-"))
        if others or "*" not in self.layers:
            what = f"{', '.join(others)} (no beacons there)" if others else "no attention"
            raise ValueError(
                f"model.pattern={self.pattern!r} has {what}: keys and values of attention are condensed; use "
                "'*' and '-' only"
            )
        if self.max_positions is not None or attention.position not in ("rope", "none"):
            raise ValueError(
                f"model.max_positions={self.max_positions}, model.attention.position={attention.position!r}: "
                "beacons move to other positions as memories; use None and 'rope' (or 'none')"
            )
        if attention.window is not None or not attention.causal:
            raise ValueError(
                f"model.attention.window={attention.window} causal={attention.causal}: beacons stand for "
                "all that attention would see; use None and True (model.beacon.window is another window)"
            )
        if self.beacon.init_id is not None and not 0 <= self.beacon.init_id < self.vocab_size:
            raise ValueError(
                f"model.beacon.init_id={self.beacon.init_id} is no id; use one in 0..{self.vocab_size - 1}"
            )
        self.beacon.validate()

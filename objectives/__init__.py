"""What can be trained: each kind of experiment with the model, task and loss it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from configs.base import BaseExperiment
from models.beacon import BeaconLM, copy_backbone
from models.beacon_config import ADDED
from models.classifier import Classifier
from models.functional import Functional, Tree
from models.hmt import HMT
from models.lm import LM
from models.lora import with_lora
from objectives.beacon import BeaconModelling
from objectives.classification import Classification
from objectives.hmt import MemoryLanguageModelling
from objectives.language import LanguageModelling
from objectives.recall import Recall
from objectives.types import Objective

MODELS: dict[str, Any] = {
    "lm": LM,
    "classification": Classifier,
    "hmt": HMT,
    "beacon": BeaconLM,
    "recall": LM,
}
OBJECTIVES: dict[str, Any] = {
    "lm": LanguageModelling,
    "classification": Classification,
    "hmt": MemoryLanguageModelling,
    "beacon": BeaconModelling,
    "recall": Recall,
}


@dataclasses.dataclass(frozen=True)
class PlugIn:
    """What a kind of model adds to a plain language model that it starts from.

    Attributes:
        added: patterns on the paths of the parameters that the plain model does not have.
        start: ``(config.model, params) -> params``, those made from the others.
    """

    added: tuple[str, ...]
    start: Callable[[Any, Tree], Tree]


PLUG_INS = {"beacon": PlugIn(ADDED, copy_backbone)}
"""By kind of experiment."""


def model_of(config: BaseExperiment) -> Functional:
    """The model of the config with its adapters, described; needs no data. Raises ValueError."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return MODELS[config.kind](config.model, rngs=rngs)

    return with_lora(Functional.create(build), config.lora)


def objective_of(config: BaseExperiment, mesh: jax.sharding.Mesh) -> Objective:
    """What the config learns, its data found. Raises FileNotFoundError, ValueError."""
    return OBJECTIVES[config.kind](config, mesh)

"""What can be trained: each kind of experiment with the model, task and loss it stands for."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from configs.base import BaseExperiment
from models.classifier import Classifier
from models.functional import Functional
from models.hmt import HMT
from models.lm import LM
from models.lora import with_lora
from objectives.classification import Classification
from objectives.hmt import MemoryLanguageModelling
from objectives.language import LanguageModelling
from objectives.types import Objective

MODELS: dict[str, Any] = {"lm": LM, "classification": Classifier, "hmt": HMT}
OBJECTIVES: dict[str, Any] = {
    "lm": LanguageModelling,
    "classification": Classification,
    "hmt": MemoryLanguageModelling,
}


def model_of(config: BaseExperiment) -> Functional:
    """The model of the config with its adapters, described; needs no data. Raises ValueError."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return MODELS[config.kind](config.model, rngs=rngs)

    return with_lora(Functional.create(build), config.lora)


def objective_of(config: BaseExperiment, mesh: jax.sharding.Mesh) -> Objective:
    """What the config learns, its data found. Raises FileNotFoundError, ValueError."""
    return OBJECTIVES[config.kind](config, mesh)

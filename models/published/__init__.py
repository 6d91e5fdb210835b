"""Configs and parameters of published checkpoints, to ours and back.

format = published.detect(raw)                                  # raw: the parsed config.json
config = published.config_from(raw)
params = published.params_from(config, weights, format)         # weights: name -> array
weights = published.weights_from(config, params, format)

A part at a time, from the shapes in a file's header and a ``read(name, box)`` of its tensors:

sources = published.parameter_sources(config, format, shapes)    # refuses what does not fit, by name
shard = sources[path].read(read, index)
for tensor in published.exported(config, format):
    value = tensor.values(read)                                  # read(path, box) of parameters
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from models.config import LMConfig
from models.functional import Tree
from models.published import tensors
from models.published.bamba import BAMBA
from models.published.blocks import Path, Source, Tensor
from models.published.fields import config_from_fields
from models.published.mamba import MAMBA_HF, MAMBA_ORIGINAL
from models.published.mamba2 import MAMBA2_HF, MAMBA2_ORIGINAL
from models.published.nemotron_h import NEMOTRON_H
from models.published.tensors import (
    expected_tensors,
    exported_tensors,
    params_from_weights,
    sources_from,
    weights_from_params,
)

FORMATS = {
    "mamba": MAMBA_HF,
    "mamba_original": MAMBA_ORIGINAL,
    "mamba2": MAMBA2_HF,
    "mamba2_original": MAMBA2_ORIGINAL,
    "bamba": BAMBA,
    "nemotron_h": NEMOTRON_H,
}
AUTHORS_LAYERS = {"Mamba1": "mamba_original", "Mamba2": "mamba2_original"}  # of state-spaces/mamba


def detect(raw: Mapping[str, Any]) -> str:
    """The format of a published config. Raises ValueError if it is none of ``FORMATS``."""
    format = raw.get("model_type")  # some of Hugging Face's keep the authors' fields beside it
    if format is None and "ssm_cfg" in raw:
        layer = raw["ssm_cfg"].get("layer", "Mamba1")
        if layer not in AUTHORS_LAYERS:
            raise ValueError(
                f"published config: ssm_cfg.layer={layer!r} is unknown; known are {sorted(AUTHORS_LAYERS)}"
            )
        format = AUTHORS_LAYERS[layer]
    if format not in FORMATS:
        raise ValueError(f"published config: model_type={format!r} is unknown; known are {sorted(FORMATS)}")
    return format


def config_from(raw: Mapping[str, Any]) -> LMConfig:
    """The ``LMConfig`` of a published config. Raises ValueError naming every field that cannot be met."""
    return config_from_fields(raw, FORMATS[detect(raw)].fields)


def params_from(config: LMConfig, weights: Mapping[str, Any], format: str, dtype: Any = np.float32) -> Tree:
    """Nested dict of parameters. Raises ValueError naming every missing, unexpected or misshapen tensor."""
    return params_from_weights(config, weights, FORMATS[format].names, dtype)


def weights_from(config: LMConfig, params: Tree, format: str) -> dict[str, np.ndarray]:
    """Published tensors of ``params``; what :func:`params_from` reads."""
    return weights_from_params(config, params, FORMATS[format].names)


def parameter_sources(
    config: LMConfig, format: str, shapes: Mapping[str, Sequence[int]]
) -> dict[Path, Source]:
    """Where in a file of tensors of these shapes every parameter is, by path.

    Raises:
        ValueError: lists by name the tensors that are missing, unexpected, or of another shape.
    """
    names = FORMATS[format].names
    return sources_from(config, expected_tensors(config, names), names, shapes)


def tied_head(config: LMConfig, format: str, found: Iterable[str]) -> tuple[str, str] | None:
    """Names in the file of a head and of the embedding it must equal, being tied to it; None without both."""
    return tensors.tied_head(config, FORMATS[format].names, found)


def exported(config: LMConfig, format: str) -> list[Tensor]:
    """The tensors of a published checkpoint of ``config``.

    Raises:
        ValueError: ``config`` has a pattern or parameters the format has no place for.
    """
    names = FORMATS[format].names
    return exported_tensors(expected_tensors(config, names), names)

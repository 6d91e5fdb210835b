"""Configs and parameters of published checkpoints, to ours and back.

format = published.detect(raw, shapes)                          # raw: the parsed config.json
config = published.config_from(raw, shapes)                     # shapes: name -> shape, of the file's header
params = published.params_from(config, weights, format)         # weights: name -> array
weights = published.weights_from(config, params, format)
raw = published.raw_from(config, format)

A part at a time, from the shapes in a file's header and a ``read(name, box)`` of its tensors:

sources = published.parameter_sources(config, format, shapes)    # refuses what does not fit, by name
shard = sources[path].read(read, index)
for tensor in published.exported(config, format):
    value = tensor.values(read)                                  # read(path, box) of parameters
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from models.config import LMConfig
from models.functional import Tree
from models.published import beacon, hmt, megatron, tensors
from models.published.bamba import BAMBA
from models.published.blocks import Path, Source, Tensor
from models.published.fields import config_from_fields
from models.published.gpt2 import GPT2, OPT
from models.published.granite import GRANITE
from models.published.inverse import raw_from_fields
from models.published.llama import LLAMA, MISTRAL, QWEN2
from models.published.mamba import FALCON_MAMBA, MAMBA_HF, MAMBA_ORIGINAL
from models.published.mamba2 import MAMBA2_HF, MAMBA2_ORIGINAL
from models.published.nemotron_h import NEMOTRON_H
from models.published.tables import Format

MODEL_TYPES = {  # of Hugging Face
    "mamba": MAMBA_HF,
    "mamba2": MAMBA2_HF,
    "falcon_mamba": FALCON_MAMBA,
    "bamba": BAMBA,
    "nemotron_h": NEMOTRON_H,
    "granitemoehybrid": GRANITE,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "gpt2": GPT2,
    "opt": OPT,
}
FORMATS: dict[str, Format] = {
    **MODEL_TYPES,
    "mamba_original": MAMBA_ORIGINAL,
    "mamba2_original": MAMBA2_ORIGINAL,
    "megatron_hybrid": megatron.MEGATRON,
    **{f"{name}_beacon": format for name, format in beacon.BEACONS.items()},
    **{f"{name}_hmt": format for name, format in hmt.HMTS.items()},
}
AUTHORS_LAYERS = {"Mamba1": "mamba_original", "Mamba2": "mamba2_original"}  # of state-spaces/mamba


def detect(raw: Mapping[str, Any], found: Iterable[str] = ()) -> str:
    """The format of a published config and of the names of its tensors, where these are known.

    Raises:
        ValueError: it is none of ``FORMATS``.
    """
    model_type = raw.get("model_type")  # some of Hugging Face's keep the authors' fields beside it
    if model_type is None and "ssm_cfg" in raw:
        layer = raw["ssm_cfg"].get("layer", "Mamba1")
        if layer not in AUTHORS_LAYERS:
            raise ValueError(
                f"published config: ssm_cfg.layer={layer!r} is unknown; known are {sorted(AUTHORS_LAYERS)}"
            )
        return AUTHORS_LAYERS[layer]
    if model_type is None and megatron.MARK in raw:
        return "megatron_hybrid"
    if model_type not in MODEL_TYPES:
        nearest = difflib.get_close_matches(str(model_type), MODEL_TYPES, 1)
        raise ValueError(
            f"published config: model_type={model_type!r} is unknown; known are {sorted(MODEL_TYPES)}"
            + "".join(f"; the nearest is {name!r}" for name in nearest)
        )
    suffix = ""
    if any(name.startswith(hmt.MARK) for name in found):
        suffix = "_hmt"
    elif beacon.MARK in raw:
        suffix = "_beacon"
    if model_type + suffix not in FORMATS:
        known = sorted(name.removesuffix(suffix) for name in FORMATS if name.endswith(suffix))
        raise ValueError(
            f"published config: model_type={model_type!r} with {suffix[1:]} weights is not supported; "
            f"backbones are {known}"
        )
    return model_type + suffix


def config_from(raw: Mapping[str, Any], shapes: Mapping[str, Sequence[int]] | None = None) -> LMConfig:
    """The ``LMConfig`` of a published config, an ``HMTConfig`` or ``BeaconLMConfig`` where it is one.

    Args:
        raw: the parsed JSON.
        shapes: of the tensors in the file, by name; HMT weights are told by them, and are no config's.

    Raises:
        ValueError: names every field that cannot be met.
    """
    shapes = shapes or {}
    format = detect(raw, shapes)
    if hmt.QUERY in shapes:
        raw = {**raw, "hmt": {"recall_dim": shapes[hmt.QUERY][0], **raw.get("hmt", {})}}
    return config_from_fields(raw, FORMATS[format].fields)


def raw_from(config: LMConfig, format: str) -> dict[str, Any]:
    """The published config, as JSON can hold it, of which :func:`config_from` makes ``config``.

    Raises:
        ValueError: names every field of ``config`` that the format has no place for.
    """
    return raw_from_fields(config, FORMATS[format].fields, format)


def params_from(config: LMConfig, weights: Mapping[str, Any], format: str, dtype: Any = np.float32) -> Tree:
    """Nested dict of parameters. Raises ValueError naming every missing, unexpected or misshapen tensor."""
    expected = _expected(config, format, weights)
    return tensors.params_from_tensors(config, expected, FORMATS[format].names, weights, dtype)


def weights_from(config: LMConfig, params: Tree, format: str) -> dict[str, np.ndarray]:
    """Published tensors of ``params``; what :func:`params_from` reads."""
    return tensors.weights_from_tensors(exported(config, format), params)


def parameter_sources(
    config: LMConfig, format: str, shapes: Mapping[str, Sequence[int]]
) -> dict[Path, Source]:
    """Where in a file of tensors of these shapes every parameter is, by path.

    Raises:
        ValueError: lists by name the tensors that are missing, unexpected, or of another shape.
    """
    return tensors.sources_from(config, _expected(config, format, shapes), FORMATS[format].names, shapes)


def tied_head(config: LMConfig, format: str, found: Iterable[str]) -> tuple[str, str] | None:
    """Names in the file of a head and of the embedding it must equal, being tied to it; None without both."""
    return tensors.tied_head(config, FORMATS[format].names, found)


def exported(config: LMConfig, format: str) -> list[Tensor]:
    """The tensors of a published checkpoint of ``config``.

    Raises:
        ValueError: ``config`` has a pattern or parameters the format has no place for.
    """
    return tensors.exported_tensors(_expected(config, format), FORMATS[format].names)


def _expected(config: LMConfig, format: str, found: Iterable[str] = ()) -> list[Tensor]:
    whole = tensors.expected_tensors(config, FORMATS[format].names)
    arranged = FORMATS[format].arranged
    return whole if arranged is None else arranged(config, whole, found)

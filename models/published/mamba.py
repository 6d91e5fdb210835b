"""Mamba-1 checkpoints: the authors' format (state-spaces/mamba), Hugging Face's, and Falcon-Mamba."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from models.config import LMConfig
from models.published.fields import Fields, require
from models.published.tables import MAMBA, PLAIN_VOCABULARY, Format, under
from models.published.tensors import Names


def _names(embedding: str, **options: Any) -> Names:
    return Names(
        top={
            embedding: ("embed.table",),
            "backbone.norm_f.weight": ("norm.scale",),
            "lm_head.weight": ("head.kernel",),
        },
        sublayers={"m": under("backbone.layers.{}.mixer.", MAMBA, norm="backbone.layers.{}.norm")},
        layer=("m",),
        embedding=embedding,
        **options,
    )


def _derived(given: Mapping[str, Any], layers: str, width: str, rank: str) -> dict[str, Any]:
    """The pattern and the rank of dt ("auto" in most files), from the published fields of these names."""
    depth, d_model, dt_rank = require(given, layers, width, rank)
    return {
        "pattern": f"(m){depth}",
        "mamba.dt_rank": math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank,
    }


_derived_hf = functools.partial(
    _derived, layers="num_hidden_layers", width="hidden_size", rank="time_step_rank"
)


def _published(config: LMConfig, model_type: str, architecture: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "num_hidden_layers": len(config.layers),
        "intermediate_size": config.mamba.d_inner,
        "time_step_rank": config.mamba.dt_rank,
    }


def _published_original(config: LMConfig) -> dict[str, Any]:
    return {
        "n_layer": len(config.layers),
        "ssm_cfg.layer": "Mamba1",
        "ssm_cfg.dt_rank": config.mamba.dt_rank,
        "residual_in_fp32": True,
        "fused_add_norm": True,
    }


OURS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "tie_word_embeddings": "tie_embeddings",
    "layer_norm_epsilon": "norm_eps",
    "state_size": "mamba.d_state",
    "expand": "mamba.expand",
    "conv_kernel": "mamba.d_conv",
    "use_conv_bias": "mamba.conv_bias",
    "use_bias": "mamba.proj_bias",
    "time_step_scale": "mamba.dt_scale",
    "time_step_min": "mamba.dt_min",
    "time_step_max": "mamba.dt_max",
    "time_step_floor": "mamba.dt_floor",
}
DEFAULTS = {
    "tie_word_embeddings": True,
    "time_step_rank": "auto",
    "time_step_scale": 1.0,
    "time_step_min": 1e-3,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
}
MAMBA_HF = Format(
    Fields(
        ours=OURS,
        derived=_derived_hf,
        published=functools.partial(_published, model_type="mamba", architecture="MambaForCausalLM"),
        implied=PLAIN_VOCABULARY,
        fixed={"hidden_act": "silu"},
        defaults=DEFAULTS,
    ),
    _names("backbone.embeddings.weight"),
)
# What dt, B and C are made of is normalised, without weights.
FALCON_MAMBA = Format(
    Fields(
        ours={**OURS, "mixer_rms_eps": "mamba.select_norm_eps"},
        derived=_derived_hf,
        published=functools.partial(
            _published, model_type="falcon_mamba", architecture="FalconMambaForCausalLM"
        ),
        implied=PLAIN_VOCABULARY,
        fixed={"hidden_act": "silu"},
        defaults={**DEFAULTS, "mixer_rms_eps": 1e-6},
    ),
    _names("backbone.embeddings.weight"),
)

# The files name few fields; the defaults are those of the authors' classes.
MAMBA_ORIGINAL = Format(
    Fields(
        ours={
            "vocab_size": "vocab_size",
            "pad_vocab_size_multiple": "vocab_multiple",
            "d_model": "d_model",
            "tie_embeddings": "tie_embeddings",
            "ssm_cfg.d_state": "mamba.d_state",
            "ssm_cfg.expand": "mamba.expand",
            "ssm_cfg.d_conv": "mamba.d_conv",
            "ssm_cfg.conv_bias": "mamba.conv_bias",
            "ssm_cfg.bias": "mamba.proj_bias",
            "ssm_cfg.dt_scale": "mamba.dt_scale",
            "ssm_cfg.dt_min": "mamba.dt_min",
            "ssm_cfg.dt_max": "mamba.dt_max",
            "ssm_cfg.dt_init_floor": "mamba.dt_floor",
        },
        derived=functools.partial(_derived, layers="n_layer", width="d_model", rank="ssm_cfg.dt_rank"),
        published=_published_original,
        fixed={"rms_norm": True, "attn_layer_idx": (), "d_intermediate": 0},
        defaults={
            "pad_vocab_size_multiple": 8,
            "tie_embeddings": True,
            "ssm_cfg.d_state": 16,
            "ssm_cfg.expand": 2,
            "ssm_cfg.d_conv": 4,
            "ssm_cfg.conv_bias": True,
            "ssm_cfg.bias": False,
            "ssm_cfg.dt_rank": "auto",
            "ssm_cfg.dt_scale": 1.0,
            "ssm_cfg.dt_min": 1e-3,
            "ssm_cfg.dt_max": 0.1,
            "ssm_cfg.dt_init_floor": 1e-4,
        },
    ),
    _names("backbone.embedding.weight", padded_vocabulary=True),
)

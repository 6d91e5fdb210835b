"""Mamba-2 checkpoints: the authors' format (state-spaces/mamba) and Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.config import LMConfig
from models.published.fields import Fields, require
from models.published.tables import DYNAMICS, DYNAMICS_DEFAULTS, MAMBA2, PLAIN_VOCABULARY, Format, under
from models.published.tensors import Names


def _mamba2_names(embedding: str, **options: Any) -> Names:
    return Names(
        top={
            embedding: ("embed.table",),
            "backbone.norm_f.weight": ("norm.scale",),
            "lm_head.weight": ("head.kernel",),
        },
        sublayers={"M": under("backbone.layers.{}.mixer.", MAMBA2, norm="backbone.layers.{}.norm")},
        layer=("M",),
        embedding=embedding,
        **options,
    )


def _mamba2_derived(given: Mapping[str, Any]) -> dict[str, Any]:
    heads, headdim, width, expand = require(given, "num_heads", "head_dim", "hidden_size", "expand")
    if heads * headdim != expand * width:
        raise ValueError(
            f"published config: num_heads * head_dim = {heads * headdim} must be "
            f"expand * hidden_size = {expand * width}"
        )
    return {"pattern": f"(M){require(given, 'num_hidden_layers')[0]}"}


def _mamba2_published(config: LMConfig) -> dict[str, Any]:
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "num_hidden_layers": len(config.layers),
        "num_heads": config.mamba2.inner(config.d_model) // config.mamba2.headdim,
    }


def _mamba2_published_original(config: LMConfig) -> dict[str, Any]:
    return {
        "n_layer": len(config.layers),
        "ssm_cfg.layer": "Mamba2",
        "residual_in_fp32": True,
        "fused_add_norm": True,
    }


MAMBA2_HF = Format(
    Fields(
        ours={
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "tie_word_embeddings": "tie_embeddings",
            "layer_norm_epsilon": ("norm_eps", "mamba2.norm_eps"),
            "state_size": "mamba2.d_state",
            "head_dim": "mamba2.headdim",
            "n_groups": "mamba2.n_groups",
            "expand": "mamba2.expand",
            "conv_kernel": "mamba2.d_conv",
            "use_conv_bias": "mamba2.conv_bias",
            "use_bias": "mamba2.proj_bias",
            **DYNAMICS,
        },
        derived=_mamba2_derived,
        published=_mamba2_published,
        implied=PLAIN_VOCABULARY,
        fixed={"hidden_act": "silu", "rms_norm": True},
        defaults={"tie_word_embeddings": False, **DYNAMICS_DEFAULTS},
    ),
    _mamba2_names("backbone.embeddings.weight"),
)


def _mamba2_original_derived(given: Mapping[str, Any]) -> dict[str, Any]:
    return {"pattern": f"(M){require(given, 'n_layer')[0]}"}


# The files name few fields; the defaults are those of the authors' classes.
MAMBA2_ORIGINAL = Format(
    Fields(
        ours={
            "vocab_size": "vocab_size",
            "pad_vocab_size_multiple": "vocab_multiple",
            "d_model": "d_model",
            "tie_embeddings": "tie_embeddings",
            "ssm_cfg.d_state": "mamba2.d_state",
            "ssm_cfg.headdim": "mamba2.headdim",
            "ssm_cfg.ngroups": "mamba2.n_groups",
            "ssm_cfg.expand": "mamba2.expand",
            "ssm_cfg.d_conv": "mamba2.d_conv",
            "ssm_cfg.conv_bias": "mamba2.conv_bias",
            "ssm_cfg.bias": "mamba2.proj_bias",
            "ssm_cfg.rmsnorm": "mamba2.rmsnorm",
            "ssm_cfg.norm_before_gate": "mamba2.norm_before_gate",
            "ssm_cfg.dt_limit": "mamba2.dt_limit",
            "ssm_cfg.dt_min": "mamba2.dt_min",
            "ssm_cfg.dt_max": "mamba2.dt_max",
            "ssm_cfg.dt_init_floor": "mamba2.dt_floor",
        },
        derived=_mamba2_original_derived,
        published=_mamba2_published_original,
        fixed={
            "rms_norm": True,
            "attn_layer_idx": (),
            "d_intermediate": 0,
            "ssm_cfg.D_has_hdim": False,
            "ssm_cfg.d_ssm": None,
        },
        defaults={
            "pad_vocab_size_multiple": 8,
            "tie_embeddings": True,
            "ssm_cfg.d_state": 128,
            "ssm_cfg.headdim": 64,
            "ssm_cfg.ngroups": 1,
            "ssm_cfg.expand": 2,
            "ssm_cfg.d_conv": 4,
            "ssm_cfg.conv_bias": True,
            "ssm_cfg.bias": False,
            "ssm_cfg.rmsnorm": True,
            "ssm_cfg.norm_before_gate": False,
            "ssm_cfg.dt_limit": (0.0, math.inf),
            "ssm_cfg.dt_min": 1e-3,
            "ssm_cfg.dt_max": 0.1,
            "ssm_cfg.dt_init_floor": 1e-4,
        },
    ),
    _mamba2_names("backbone.embedding.weight", padded_vocabulary=True),
)

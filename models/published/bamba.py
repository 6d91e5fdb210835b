"""Bamba checkpoints (Hugging Face): Mamba-2 or attention, then a gated MLP, in every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.config import LMConfig
from models.published.fields import Fields, require
from models.published.tables import ATTENTION, MAMBA2, MLP, PLAIN_VOCABULARY, Format, under
from models.published.tensors import Names


def _bamba_derived(given: Mapping[str, Any]) -> dict[str, Any]:
    layers, heads = require(given, "num_hidden_layers", "mamba_n_heads")
    inner = math.prod(require(given, "mamba_expand", "hidden_size"))
    if inner % heads or given.get("mamba_d_head", "auto") not in ("auto", inner // heads):
        raise ValueError(
            f"published config: mamba_d_head={given.get('mamba_d_head')!r} * mamba_n_heads={heads} must be "
            f"mamba_expand * hidden_size = {inner}"
        )
    attention = given.get("attn_layer_indices") or ()
    pattern = "".join("*-" if i in attention else "M-" for i in range(layers))
    return {"pattern": pattern, "mamba2.headdim": inner // heads}


def _bamba_published(config: LMConfig) -> dict[str, Any]:
    mixers = config.layers[::2]
    return {
        "model_type": "bamba",
        "architectures": ["BambaForCausalLM"],
        "num_hidden_layers": len(mixers),
        "attn_layer_indices": [i for i, symbol in enumerate(mixers) if symbol == "*"],
        "mamba_n_heads": config.mamba2.inner(config.d_model) // config.mamba2.headdim,
        "mamba_d_head": config.mamba2.headdim,
    }


BAMBA = Format(
    Fields(
        ours={
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "tie_word_embeddings": "tie_embeddings",
            "rms_norm_eps": ("norm_eps", "mamba2.norm_eps"),
            "mamba_d_state": "mamba2.d_state",
            "mamba_n_groups": "mamba2.n_groups",
            "mamba_expand": "mamba2.expand",
            "mamba_d_conv": "mamba2.d_conv",
            "mamba_conv_bias": "mamba2.conv_bias",
            "mamba_proj_bias": "mamba2.proj_bias",
            "time_step_limit": "mamba2.dt_limit",
            "num_attention_heads": "attention.num_heads",
            "num_key_value_heads": "attention.num_kv_heads",
            "attention_bias": ("attention.qkv_bias", "attention.out_bias"),
            "rope_parameters.rope_theta": "attention.rope.theta",
            "intermediate_size": "mlp.hidden",
            "mlp_bias": "mlp.use_bias",
        },
        derived=_bamba_derived,
        published=_bamba_published,
        implied={
            **PLAIN_VOCABULARY,
            "attention.position": "rope",
            "attention.rope.fraction": 0.5,
            "mlp.activation": "swiglu",
        },
        fixed={
            "hidden_act": "silu",
            "rope_parameters.rope_type": "default",
            "rope_parameters.partial_rotary_factor": 0.5,
            "rope_scaling": None,
        },
        defaults={
            "tie_word_embeddings": False,
            "time_step_limit": (0.0, math.inf),
            "rope_parameters.rope_theta": 10_000.0,
            "attention_bias": False,
            "mlp_bias": False,
        },
        aliases={"rope_theta": "rope_parameters.rope_theta"},
    ),
    Names(
        top={
            "model.embed_tokens.weight": ("embed.table",),
            "model.final_layernorm.weight": ("norm.scale",),
            "lm_head.weight": ("head.kernel",),
        },
        sublayers={
            "M": under("model.layers.{}.mamba.", MAMBA2, norm="model.layers.{}.input_layernorm"),
            "*": under("model.layers.{}.self_attn.", ATTENTION, norm="model.layers.{}.input_layernorm"),
            "-": under("model.layers.{}.feed_forward.", MLP, norm="model.layers.{}.pre_ff_layernorm"),
        },
        layer=("M*", "-"),
    ),
)

"""Granite hybrids without experts (Hugging Face's ``granitemoehybrid``): as Bamba, with multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.config import LMConfig
from models.published.fields import Fields, require
from models.published.rope import rope_from, rope_to
from models.published.tables import ATTENTION, MAMBA2, PLAIN_VOCABULARY, Format, linear, under
from models.published.tensors import Names

KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*"}


def _derived(given: Mapping[str, Any]) -> dict[str, Any]:
    heads, kinds = require(given, "mamba_n_heads", "layer_types")
    inner = math.prod(require(given, "mamba_expand", "hidden_size"))
    if inner % heads or given.get("mamba_d_head", "auto") not in ("auto", inner // heads):
        raise ValueError(
            f"published config: mamba_d_head={given.get('mamba_d_head')!r} * mamba_n_heads={heads} must be "
            f"mamba_expand * hidden_size = {inner}"
        )
    position = given.get("position_embedding_type") or "nope"
    if position not in ("nope", "rope"):
        raise ValueError(
            f"published config: position_embedding_type={position!r} is not supported, only 'nope' and 'rope'"
        )
    rope = rope_from(given, given.get("max_position_embeddings")) if position == "rope" else {}
    return {
        "pattern": "".join(KINDS.get(kind, "?") + "-" for kind in kinds),
        "mamba2.headdim": inner // heads,
        "attention.position": "rope" if rope else "none",
        **rope,
    }


def _published(config: LMConfig) -> dict[str, Any]:
    rotary = config.attention.position == "rope"
    kinds = {"M": "linear_attention", "*": "full_attention"}
    return {
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "num_hidden_layers": len(config.layers) // 2,
        "layer_types": [kinds.get(symbol, symbol) for symbol in config.layers[::2]],
        "mamba_n_heads": config.mamba2.inner(config.d_model) // config.mamba2.headdim,
        "mamba_d_head": config.mamba2.headdim,
        "position_embedding_type": "rope" if rotary else None,
        "intermediate_size": config.mlp.hidden,  # of the experts that are not there
        "num_experts_per_tok": 0,
        **(rope_to(config.attention.rope) if rotary else {}),
    }


GRANITE = Format(
    Fields(
        ours={
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "tie_word_embeddings": "tie_embeddings",
            "rms_norm_eps": ("norm_eps", "mamba2.norm_eps"),
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logits_divisor",
            "attention_multiplier": "attention.softmax_scale",
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
            "shared_intermediate_size": "mlp.hidden",
        },
        derived=_derived,
        published=_published,
        implied={**PLAIN_VOCABULARY, "mlp.activation": "swiglu"},
        fixed={"hidden_act": "silu", "num_local_experts": 0},
        defaults={
            "tie_word_embeddings": False,
            "time_step_limit": (0.0, math.inf),
            "attention_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "attention_multiplier": 1.0,
        },
        aliases={"layers_block_type": "layer_types"},
    ),
    Names(
        top={
            "model.embed_tokens.weight": ("embed.table",),
            "model.norm.weight": ("norm.scale",),
            "lm_head.weight": ("head.kernel",),
        },
        sublayers={
            "M": under("model.layers.{}.mamba.", MAMBA2, norm="model.layers.{}.input_layernorm"),
            "*": under("model.layers.{}.self_attn.", ATTENTION, norm="model.layers.{}.input_layernorm"),
            "-": under(
                "model.layers.{}.shared_mlp.",
                {**linear("input_linear", "gate", "up"), **linear("output_linear", "down")},
                norm="model.layers.{}.post_attention_layernorm",
            ),
        },
        layer=("M*", "-"),
    ),
)

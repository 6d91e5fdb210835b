"""Llama, Mistral and Qwen2 checkpoints (Hugging Face): rotary attention, then a gated MLP, in every layer."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from models.config import LMConfig
from models.published.fields import Fields, require
from models.published.rope import rope_from, rope_to
from models.published.tables import ATTENTION, MLP, PLAIN_VOCABULARY, Format, under
from models.published.tensors import Names

NAMES = Names(
    top={
        "model.embed_tokens.weight": ("embed.table",),
        "model.norm.weight": ("norm.scale",),
        "lm_head.weight": ("head.kernel",),
    },
    sublayers={
        "*": under("model.layers.{}.self_attn.", ATTENTION, norm="model.layers.{}.input_layernorm"),
        "-": under("model.layers.{}.mlp.", MLP, norm="model.layers.{}.post_attention_layernorm"),
    },
    layer=("*", "-"),
    ignored=("*.rotary_emb.inv_freq",),
)
COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_eps",
    "num_attention_heads": "attention.num_heads",
    "intermediate_size": "mlp.hidden",
}
IMPLIED = {**PLAIN_VOCABULARY, "attention.position": "rope", "mlp.activation": "swiglu"}
DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}


def _derived(given: Mapping[str, Any], **windows: Any) -> dict[str, Any]:
    depth, heads = require(given, "num_hidden_layers", "num_attention_heads")
    return {
        "pattern": f"(*-){depth}",
        "attention.head_dim": given.get("head_dim"),
        "attention.num_kv_heads": given.get("num_key_value_heads") or heads,
        **rope_from(given, given.get("max_position_embeddings")),
        **windows,
    }


def _mistral_derived(given: Mapping[str, Any]) -> dict[str, Any]:
    return _derived(given, **{"attention.window": given["sliding_window"]})


def _qwen2_derived(given: Mapping[str, Any]) -> dict[str, Any]:
    """With ``use_sliding_window``, layers from ``max_window_layers`` on have a window."""
    depth, window = given["num_hidden_layers"], given["sliding_window"]
    kinds = given.get("layer_types")
    if kinds is None:
        full = given["max_window_layers"] if given["use_sliding_window"] and window is not None else depth
        kinds = ["full_attention"] * min(full, depth) + ["sliding_attention"] * (depth - full)
    if len(set(kinds)) > 1:
        raise ValueError(
            f"published config: layer_types={kinds} (or max_window_layers) mixes layers with and without a "
            "window; only layers that are all alike are supported"
        )
    return _derived(given, **{"attention.window": None if kinds[0] == "full_attention" else window})


def _published(config: LMConfig, model_type: str, architecture: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "num_hidden_layers": len(config.layers) // 2,
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention.head_dim,
        **rope_to(config.attention.rope),
    }


def _mistral_published(config: LMConfig) -> dict[str, Any]:
    window = {"sliding_window": config.attention.window}
    return _published(config, "mistral", "MistralForCausalLM") | window


def _qwen2_published(config: LMConfig) -> dict[str, Any]:
    window, depth = config.attention.window, len(config.layers) // 2
    return _published(config, "qwen2", "Qwen2ForCausalLM") | {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": depth if window is None else 0,
        "layer_types": ["full_attention" if window is None else "sliding_attention"] * depth,
    }


LLAMA = Format(
    Fields(
        ours={
            **COMMON,
            "attention_bias": ("attention.qkv_bias", "attention.out_bias"),
            "mlp_bias": "mlp.use_bias",
        },
        derived=_derived,
        published=functools.partial(_published, model_type="llama", architecture="LlamaForCausalLM"),
        implied=IMPLIED,
        fixed={"hidden_act": "silu"},
        defaults={**DEFAULTS, "attention_bias": False, "mlp_bias": False},
    ),
    NAMES,
)
MISTRAL = Format(
    Fields(
        ours=COMMON,
        derived=_mistral_derived,
        published=_mistral_published,
        implied=IMPLIED,
        fixed={"hidden_act": "silu"},
        defaults={**DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    NAMES,
)
QWEN2 = Format(
    Fields(
        ours=COMMON,
        derived=_qwen2_derived,
        published=_qwen2_published,
        implied={**IMPLIED, "attention.qkv_bias": True},
        fixed={"hidden_act": "silu"},
        defaults={
            **DEFAULTS,
            "num_key_value_heads": 32,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
    ),
    NAMES,
)

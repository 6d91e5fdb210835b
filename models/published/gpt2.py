"""GPT-2 and OPT checkpoints (Hugging Face): learned positions, LayerNorm, biases, an MLP without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import LMConfig
from models.published.fields import Fields, require
from models.published.tables import ATTENTION, PLAIN_VOCABULARY, Format, linear, under
from models.published.tensors import Names

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
PUBLISHED = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
IMPLIED = {
    **PLAIN_VOCABULARY,
    "norm": "layer",
    "attention.position": "none",
    "attention.qkv_bias": True,
    "attention.out_bias": True,
    "mlp.use_bias": True,
}


def _activation(given: Mapping[str, Any], default: str) -> str:
    name = given.get("activation_function", default)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"published config: activation_function={name!r} is not supported; known are "
            f"{sorted(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _gpt2_derived(given: Mapping[str, Any]) -> dict[str, Any]:
    depth, width = require(given, "n_layer", "n_embd")
    return {
        "pattern": f"(*-){depth}",
        "mlp.hidden": given.get("n_inner") or 4 * width,
        "mlp.activation": _activation(given, "gelu_new"),
    }


def _gpt2_published(config: LMConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": len(config.layers) // 2,
        "n_inner": config.mlp.hidden,
        "activation_function": PUBLISHED.get(config.mlp.activation, config.mlp.activation),
    }


def _opt_derived(given: Mapping[str, Any]) -> dict[str, Any]:
    depth, width = require(given, "num_hidden_layers", "hidden_size")
    if (given.get("word_embed_proj_dim") or width) != width:
        raise ValueError(
            f"published config: word_embed_proj_dim={given['word_embed_proj_dim']} is not supported, only "
            f"hidden_size={width}"
        )
    return {"pattern": f"(*-){depth}", "mlp.activation": _activation(given, "relu")}


def _opt_published(config: LMConfig) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "num_hidden_layers": len(config.layers) // 2,
        "word_embed_proj_dim": config.d_model,
        "activation_function": PUBLISHED.get(config.mlp.activation, config.mlp.activation),
    }


GPT2 = Format(
    Fields(
        ours={
            "vocab_size": "vocab_size",
            "n_embd": "d_model",
            "n_head": "attention.num_heads",
            "n_positions": "max_positions",
            "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings",
        },
        derived=_gpt2_derived,
        published=_gpt2_published,
        implied=IMPLIED,
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        defaults={"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    ),
    Names(
        top={
            "transformer.wte.weight": ("embed.table",),
            "transformer.wpe.weight": ("embed.positions",),
            "transformer.ln_f.weight": ("norm.scale",),
            "transformer.ln_f.bias": ("norm.bias",),
            "lm_head.weight": ("head.kernel",),
        },
        sublayers={
            "*": under(
                "transformer.h.{}.attn.",
                {**linear("c_attn", "q", "k", "v"), **linear("c_proj", "out")},
                norm="transformer.h.{}.ln_1",
            ),
            "-": under(
                "transformer.h.{}.mlp.",
                {**linear("c_fc", "up"), **linear("c_proj", "down")},
                norm="transformer.h.{}.ln_2",
            ),
        },
        layer=("*", "-"),
        embedding="transformer.wte.weight",
        renamed={r"^(wte|wpe|h|ln_f)\.": r"transformer.\1."},
        ignored=("*.attn.bias", "*.attn.masked_bias"),  # the causal mask
        inputs_first=True,
    ),
)
# The first two rows of OPT's positions belong to no token. They are read over, and written as zeros.
OPT = Format(
    Fields(
        ours={
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "num_attention_heads": "attention.num_heads",
            "max_position_embeddings": "max_positions",
            "ffn_dim": "mlp.hidden",
            "tie_word_embeddings": "tie_embeddings",
        },
        derived=_opt_derived,
        published=_opt_published,
        implied={**IMPLIED, "norm_eps": 1e-5},
        fixed={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
        },
        defaults={"max_position_embeddings": 2048, "tie_word_embeddings": True},
    ),
    Names(
        top={
            "model.decoder.embed_tokens.weight": ("embed.table",),
            "model.decoder.embed_positions.weight": ("embed.positions",),
            "model.decoder.final_layer_norm.weight": ("norm.scale",),
            "model.decoder.final_layer_norm.bias": ("norm.bias",),
            "lm_head.weight": ("head.kernel",),
        },
        sublayers={
            "*": under(
                "model.decoder.layers.{}.self_attn.",
                {name.replace("o_proj", "out_proj"): parts for name, parts in ATTENTION.items()},
                norm="model.decoder.layers.{}.self_attn_layer_norm",
            ),
            "-": under(
                "model.decoder.layers.{}.",
                {**linear("fc1", "up"), **linear("fc2", "down")},
                norm="model.decoder.layers.{}.final_layer_norm",
            ),
        },
        layer=("*", "-"),
        embedding="model.decoder.embed_tokens.weight",
        renamed={r"^decoder\.": "model.decoder."},
        skipped={"model.decoder.embed_positions.weight": 2},
    ),
)

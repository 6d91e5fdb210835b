"""Nemotron-H checkpoints (Hugging Face): one Mamba-2, attention or MLP sub-layer in every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.config import LMConfig
from models.published.fields import Fields, require
from models.published.tables import (
    ATTENTION,
    DYNAMICS,
    DYNAMICS_DEFAULTS,
    MAMBA2,
    MLP,
    PLAIN_VOCABULARY,
    Format,
    under,
)
from models.published.tensors import Names

KINDS = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}


def _nemotron_h_derived(given: Mapping[str, Any]) -> dict[str, Any]:
    kinds = given.get("layers_block_type")
    if kinds is None:
        pattern = require(given, "hybrid_override_pattern")[0]
    else:
        pattern = "".join(KINDS.get(kind, "?") for kind in kinds)
    inner = math.prod(require(given, "mamba_num_heads", "mamba_head_dim"))  # ``expand`` is ignored there
    return {"pattern": pattern, "mamba2.d_inner": inner}


def _nemotron_h_published(config: LMConfig) -> dict[str, Any]:
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "num_hidden_layers": len(config.layers),
        "layers_block_type": [kinds.get(symbol, symbol) for symbol in config.layers],
        "mamba_num_heads": config.mamba2.inner(config.d_model) // config.mamba2.headdim,
        "expand": config.mamba2.expand,
    }


# Its published code clamps dt from below by time_step_min, but only in pieces of several tokens; see
# ``Mamba2Config.prefill_dt_min``. The models were trained without.
NEMOTRON_H = Format(
    Fields(
        ours={
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "tie_word_embeddings": "tie_embeddings",
            "layer_norm_epsilon": ("norm_eps", "mamba2.norm_eps"),
            "ssm_state_size": "mamba2.d_state",
            "mamba_head_dim": "mamba2.headdim",
            "n_groups": "mamba2.n_groups",
            "conv_kernel": "mamba2.d_conv",
            "use_conv_bias": "mamba2.conv_bias",
            "use_bias": "mamba2.proj_bias",
            **DYNAMICS,
            "num_attention_heads": "attention.num_heads",
            "num_key_value_heads": "attention.num_kv_heads",
            "head_dim": "attention.head_dim",
            "attention_bias": ("attention.qkv_bias", "attention.out_bias"),
            "intermediate_size": "mlp.hidden",
            "mlp_bias": "mlp.use_bias",
        },
        derived=_nemotron_h_derived,
        published=_nemotron_h_published,
        implied={**PLAIN_VOCABULARY, "attention.position": "none", "mlp.activation": "relu2"},
        fixed={
            "mlp_hidden_act": "relu2",
            "mamba_hidden_act": "silu",
            "sliding_window": None,
            "num_nextn_predict_layers": 0,
        },
        defaults={"tie_word_embeddings": False, **DYNAMICS_DEFAULTS},
        aliases={
            "layer_types": "layers_block_type",
            "mamba_n_groups": "n_groups",
            "mamba_d_conv": "conv_kernel",
            "mamba_conv_bias": "use_conv_bias",
            "mamba_dt_min": "time_step_min",
            "mamba_dt_max": "time_step_max",
            "mamba_dt_limit": "time_step_limit",
            "mamba_dt_init_floor": "time_step_floor",
        },
    ),
    Names(
        top={
            "backbone.embeddings.weight": ("embed.table",),
            "backbone.norm_f.weight": ("norm.scale",),
            "lm_head.weight": ("head.kernel",),
        },
        sublayers={
            symbol: under("backbone.layers.{}.mixer.", table, norm="backbone.layers.{}.norm")
            for symbol, table in (("M", MAMBA2), ("*", ATTENTION), ("-", MLP))
        },
        layer=("M*-",),
        embedding="backbone.embeddings.weight",
        renamed={r"^model\.": "backbone."},  # in memory transformers has it so
    ),
)

"""Names of transformers' GPT-2 and Llama tensors, for vectors that were made with them as backbones."""

import numpy as np

from models.published.tables import ATTENTION, MLP, linear, under
from models.published.tensors import Names

LLAMA = Names(
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
)
GPT2 = Names(
    top={
        "transformer.wte.weight": ("embed.table",),
        "transformer.wpe.weight": ("embed.positions",),
        "transformer.ln_f.weight": ("norm.scale",),
        "transformer.ln_f.bias": ("norm.bias",),
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
)


def gpt2_weights(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GPT-2 stores its projections [in, out]; here they are turned to torch's usual [out, in]."""
    return {name: w.T if ".c_" in name and w.ndim == 2 else w for name, w in weights.items()}

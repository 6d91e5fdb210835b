"""Mamba-2 hybrids of NVIDIA's Megatron-LM (arXiv:2406.07887), whole or cut up for tensor parallelism.

A checkpoint of n tensor-parallel ranks has the tensors of each under the name of its folder,
"mp_rank_00/decoder..."; that of one rank may go without. A rank keeps its share of z, of x, of B, of C and of
dt in one tensor, and of attention some groups of queries, each followed by its key and value head. The config
is what the arguments of the training run (``args`` in the file) say.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models.config import LMConfig
from models.published.blocks import Tensor, split, stack
from models.published.fields import Fields, require
from models.published.tables import MAMBA2, PLAIN_VOCABULARY, Format, linear, under
from models.published.tensors import Names

MARK = "padded_vocab_size"  # a field that only such a config has
RANK = re.compile(r"^(mp_rank_\d+)/")
QKV = "*.linear_qkv.*"
# The axis along which tensors are cut; the others are whole in every rank.
CUT = {
    **dict.fromkeys(("*.mixer.in_proj.weight", "*.mixer.conv1d.*", "*.mixer.norm.weight", QKV), 0),
    **dict.fromkeys(("*.A_log", "*.mixer.D", "*.dt_bias", "*.linear_fc1.*"), 0),
    **dict.fromkeys(("embedding.word_embeddings.weight", "output_layer.weight"), 0),
    **dict.fromkeys(("*.mixer.out_proj.weight", "*.linear_proj.weight", "*.linear_fc2.weight"), 1),
}


def arranged(config: LMConfig, whole: Iterable[Tensor], found: Iterable[str]) -> list[Tensor]:
    """The tensors of a file with these names, from those of the whole model.

    Raises:
        ValueError: something does not divide by the ranks.
    """
    ranks = sorted({match[1] for match in map(RANK.match, found) if match})
    groups = config.attention.num_kv_heads or config.attention.num_heads
    tensors = []
    for tensor in whole:
        axis = next(
            (axis for pattern, axis in CUT.items() if fnmatch.fnmatchcase(tensor.name, pattern)), None
        )
        parts = split(tensor, groups, 0) if fnmatch.fnmatchcase(tensor.name, QKV) else None
        if not ranks:
            tensors.append(tensor if parts is None else _joined(parts))
        elif axis is None:
            tensors += [_copy(tensor, rank, rank == ranks[0]) for rank in ranks]
        else:
            shares = split(tensor, len(ranks), axis) if parts is None else _dealt(parts, len(ranks))
            tensors += [_named(share, f"{rank}/{tensor.name}") for rank, share in zip(ranks, shares)]
    return tensors


def _dealt(groups: Sequence[Tensor], ranks: int) -> list[Tensor]:
    """Equally many groups for every rank."""
    if len(groups) % ranks:
        raise ValueError(
            f"{groups[0].name}: {len(groups)} groups of queries cannot be dealt to {ranks} tensor-parallel "
            "ranks; a rank has whole groups"
        )
    each = len(groups) // ranks
    return [_joined(groups[rank * each : (rank + 1) * each]) for rank in range(ranks)]


def _joined(groups: Sequence[Tensor]) -> Tensor:
    return stack(groups[0].name, [block for group in groups for block in group.blocks], 0)


def _named(tensor: Tensor, name: str) -> Tensor:
    return Tensor(name, tensor.shape, tensor.blocks, tensor.shape[0])


def _copy(tensor: Tensor, rank: str, read: bool) -> Tensor:
    """What every rank has; one of them is read."""
    return Tensor(f"{rank}/{tensor.name}", tensor.shape, tensor.blocks if read else (), tensor.shape[0])


def _derived(given: Mapping[str, Any]) -> dict[str, Any]:
    heads, pattern = require(given, "num_attention_heads", "hybrid_override_pattern")
    activations = [name for name in ("swiglu", "squared_relu", "openai_gelu") if given.get(name)]
    ours = {"swiglu": "swiglu", "squared_relu": "relu2", "openai_gelu": "gelu_tanh"}
    grouped = given.get("group_query_attention")
    return {
        "pattern": pattern,
        "attention.num_kv_heads": require(given, "num_query_groups")[0] if grouped else heads,
        "attention.head_dim": given.get("kv_channels"),
        "mlp.hidden": given.get("ffn_hidden_size"),
        "mlp.activation": ours[activations[0]] if activations else "gelu",
        "tie_embeddings": not given["untie_embeddings_and_output_weights"],
        "mamba2.d_inner": _inner(given),
    }


def _inner(given: Mapping[str, Any]) -> int | None:
    """Width of x; twice that of the model unless the number of heads is given."""
    heads = given.get("mamba_num_heads")
    return None if heads is None else heads * given["mamba_head_dim"]


MEGATRON = Format(
    Fields(
        ours={
            MARK: "vocab_size",
            "hidden_size": "d_model",
            "norm_epsilon": "norm_eps",
            "mamba_state_dim": "mamba2.d_state",
            "mamba_head_dim": "mamba2.headdim",
            "mamba_num_groups": "mamba2.n_groups",
            "num_attention_heads": "attention.num_heads",
        },
        derived=_derived,
        implied={**PLAIN_VOCABULARY, "attention.position": "none"},
        fixed={
            "position_embedding_type": "none",
            "normalization": "RMSNorm",
            "apply_layernorm_1p": False,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "qk_layernorm": False,
            "num_experts": None,
            "pipeline_model_parallel_size": 1,
        },
        defaults={
            "norm_epsilon": 1e-5,
            "mamba_state_dim": 128,
            "mamba_head_dim": 64,
            "mamba_num_groups": 8,
            "untie_embeddings_and_output_weights": False,
        },
    ),
    Names(
        top={
            "embedding.word_embeddings.weight": ("embed.table",),
            "decoder.final_norm.weight": ("norm.scale",),
            "output_layer.weight": ("head.kernel",),
        },
        sublayers={
            symbol: under(f"decoder.layers.{{}}.{place}.", table, norm="decoder.layers.{}.norm")
            for symbol, place, table in (
                ("M", "mixer", MAMBA2),
                (
                    "*",
                    "self_attention",
                    {**linear("linear_qkv", "q", "k", "v"), **linear("linear_proj", "out")},
                ),
                ("-", "mlp", {**linear("linear_fc1", "gate", "up"), **linear("linear_fc2", "down")}),
            )
        },
        layer=("M*-",),
        embedding="embedding.word_embeddings.weight",
        head="output_layer.weight",
        # The norm before a sub-layer is its own, or part of the projection that follows it.
        renamed={
            r"(layers\.\d+)\.[a-z_]+\.(in_proj|linear_fc1|linear_qkv)\.layer_norm_weight$": r"\1.norm.weight",
            r"(layers\.\d+)\.(input_layernorm|pre_mlp_layernorm)\.weight$": r"\1.norm.weight",
        },
        ignored=("*_extra_state",),
    ),
    arranged,
)

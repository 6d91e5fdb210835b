"""Activation Beacon checkpoints of its authors: a Llama, Mistral or Qwen2 with projections for beacons."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.beacon_config import BeaconLMConfig
from models.published.llama import LLAMA, MISTRAL, NAMES, QWEN2
from models.published.tables import ATTENTION, Format, linear, under

MARK = "beacon_window"  # the field that tells such a config from its backbone's
OWN = {
    **linear("beacon_q_proj", "beacon.q"),
    **linear("beacon_k_proj", "beacon.k"),
    **linear("beacon_v_proj", "beacon.v"),
    **linear("beacon_o_proj", "beacon.out"),
}
BEACON_NAMES = dataclasses.replace(
    NAMES,
    top={**NAMES.top, "model.beacon_embed_tokens.weight": ("beacon_embed",)},
    sublayers={
        **NAMES.sublayers,
        "*": under(
            "model.layers.{}.self_attn.", {**ATTENTION, **OWN}, norm="model.layers.{}.input_layernorm"
        ),
    },
)


def _with_beacons(backbone: Format) -> Format:
    def derived(given: Mapping[str, Any]) -> dict[str, Any]:
        return {**backbone.fields.derived(given), **_condensing(given)}

    fields = dataclasses.replace(
        backbone.fields,
        ours={**backbone.fields.ours, MARK: "beacon.window", "beacon_stride": "beacon.stride"},
        derived=derived,
        defaults={**backbone.fields.defaults, "beacon_stride": None, "sliding_window": None},
        blank=BeaconLMConfig,
        published=None,
    )
    return Format(fields, BEACON_NAMES)


def _condensing(given: Mapping[str, Any]) -> dict[str, Any]:
    """How it condenses; outside training the published code chooses the ratio by the length of the text."""
    projections = set(given.get("beacon_param") or "qkv")
    if projections not in (set("qkv"), set("qkvo")):
        raise ValueError(
            f"published config: beacon_param={sorted(projections)} is not supported, only q, k, v and "
            "q, k, v, o"
        )
    if given.get("beacon_parallel_window", 1) != 1:
        raise ValueError(
            f"published config: beacon_parallel_window={given['beacon_parallel_window']} is not supported, "
            "only 1"
        )
    interleaved = given.get("beacon_pos", "interleave") == "interleave"
    mix = given.get("beacon_ratio_mix", "step-random")
    ratios = given.get("beacon_ratio") or (2, 4, 8, 16, 32)
    return {
        "beacon.ratios": ratios if isinstance(ratios, tuple) else (ratios,),
        "beacon.mix": mix,
        "beacon.eval_ratios": (),
        "beacon.eval_mix": mix if mix.startswith("adapt-") else "adapt-1024",
        "beacon.positions": given.get("max_position_embeddings"),
        "beacon.variant": "interleaved" if interleaved else given.get("beacon_attn", "step-expansion"),
        "beacon.attend_previous": given.get("beacon_attend_prev", True),
        "beacon.own_out": "o" in projections,
        "beacon.sinks": given.get("beacon_sink_size", 0),
    }


BEACONS = {
    name: _with_beacons(format) for name, format in (("llama", LLAMA), ("mistral", MISTRAL), ("qwen2", QWEN2))
}

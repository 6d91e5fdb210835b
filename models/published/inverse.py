"""``LMConfig`` to a published config file, the inverse of ``fields.py``."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from layers.rope import RopeConfig
from models.config import LMConfig
from models.published.fields import Fields, config_from_fields
from models.registry import KINDS

# What is about computing or training a model, not part of what it computes.
FREE = (
    *("dtype", "residual_dtype", "init_std", "rescale_residual", "remat", "loss_chunks", "z_loss", "pattern"),
    *("vocab_multiple", "cache_dtype", "implementation", "chunk_size", "prefill_dt_min"),
    *("A_min", "A_max", "dt_min", "dt_max", "dt_floor", "dt_scale"),
    *("mix", "first_window_loss", "init_id", "bptt_depth", "documents"),
)


def raw_from_fields(config: LMConfig, fields: Fields, format: str) -> dict[str, Any]:
    """The published config (as JSON can hold it) that :func:`config_from_fields` reads as ``config``.

    Raises:
        ValueError: the format has no place for some of ``config``; all such fields are named.
    """
    if fields.published is None:
        raise ValueError(f"checkpoints of format {format!r} can only be read")
    ours = written_out(config)
    flat = {name: value for name, value in fields.fixed.items() if value is not None}
    for name, targets in fields.ours.items():
        flat[name] = _get(ours, targets if isinstance(targets, str) else targets[0])
    flat |= fields.published(ours)
    raw: dict[str, Any] = {}
    for name, value in flat.items():
        # Only the published default is infinite, and files of it hold what is no JSON.
        if not (isinstance(value, tuple) and math.inf in value and value == fields.defaults.get(name)):
            _put(raw, name, list(value) if isinstance(value, tuple) else value)
    given, found = compared(config), compared(config_from_fields(raw, fields))
    lost = [f"model.{name}={value!r}" for name, value in given.items() if found.get(name) != value]
    if lost:
        raise ValueError(f"a checkpoint of format {format!r} has no place for {', '.join(lost)}")
    return raw


def written_out(config: LMConfig) -> Any:
    """A copy with the values that None stands for, and with defaults where a field has no effect."""
    ours = copy.deepcopy(config)
    width, a = ours.d_model, ours.attention
    a.num_kv_heads = a.num_kv_heads or a.num_heads
    a.head_dim = a.head_dim or width // a.num_heads
    a.softmax_scale = a.softmax_scale or a.head_dim**-0.5
    a.norm_eps = a.norm_eps if a.qk_norm else 0.0
    a.rope = a.rope if a.position == "rope" else RopeConfig()
    for mixer in (ours.mamba, ours.mamba2):
        mixer.d_inner = mixer.inner(width)
        mixer.expand = mixer.d_inner // width
    ours.mamba.dt_rank = ours.mamba.rank(width)
    ours.mlp.hidden = ours.mlp.width(width)
    return ours


def compared(config: LMConfig) -> dict[str, Any]:
    """Dotted fields that say what a model computes, its weights aside; equal for models that are the same."""
    used = {KINDS[symbol].field for symbol in config.layers}
    unused = {kind.field for kind in KINDS.values()} - used
    return {"layers": config.layers, **_dotted(written_out(config), "", unused)}


def _dotted(config: Any, prefix: str, left_out: set[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if field.name in FREE or name in left_out:
            continue
        if dataclasses.is_dataclass(value):
            flat |= _dotted(value, f"{name}.", left_out)
        else:
            flat[name] = value
    return flat


def _get(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def _put(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, name = dotted.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
    raw[name] = value

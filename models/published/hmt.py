"""HMT checkpoints of its authors: the state of their wrapper, its backbone's tensors under ``memory_cell``.

The file says nothing of how a text is cut into segments: a config may have the fields of ``MemoryConfig`` in
an object "hmt" beside those of the backbone, else they have their defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from models.hmt_config import HMTConfig, MemoryConfig
from models.published.gpt2 import GPT2, OPT
from models.published.llama import LLAMA, MISTRAL, QWEN2
from models.published.tables import Format
from models.published.tensors import Names, Table

MARK = "memory_cell."  # what the names of such a file begin with
QUERY = "cross_attn.wq.weight"  # [h, D]
PREFIX = "memory_cell.model."
MEMORY = {
    "memory_cell.memory": ("memory.prompt",),
    "mem": ("memory.topic",),
    QUERY: ("memory.wq.kernel",),
    "cross_attn.wk.weight": ("memory.wk.kernel",),
}
LATER = {  # names of the authors' later code
    r"^memory_cell\.init_pre_memory_state$": "memory_cell.memory",
    r"^summary_cell\.sum_prompt_embeds$": "mem",
}


def _with_memory(backbone: Format) -> Format:
    def derived(given: Mapping[str, Any]) -> dict[str, Any]:
        memory, known = given.get("hmt") or {}, [field.name for field in dataclasses.fields(MemoryConfig)]
        unknown = sorted(set(memory) - set(known))
        if unknown:
            raise ValueError(f"published config: hmt.{unknown[0]} is unknown; known are {', '.join(known)}")
        return {**backbone.fields.derived(given), **{f"memory.{n}": value for n, value in memory.items()}}

    published = backbone.fields.published
    assert published is not None
    fields = dataclasses.replace(
        backbone.fields, derived=derived, published=_publisher(published), blank=HMTConfig
    )
    return Format(fields, _prefixed(backbone.names))


def _publisher(backbone: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    def published(config: HMTConfig) -> dict[str, Any]:
        return {**backbone(config), "hmt": dataclasses.asdict(config.memory)}

    return published


def _prefixed(names: Names) -> Names:
    """The names of a backbone inside the wrapper, and those of the memory."""

    def prefixed(table: Mapping[str, Any]) -> Table:
        return {PREFIX + name: value for name, value in table.items()}

    return dataclasses.replace(
        names,
        top={**prefixed(names.top), **MEMORY},
        sublayers={symbol: prefixed(table) for symbol, table in names.sublayers.items()},
        embedding=PREFIX + names.embedding,
        head=PREFIX + names.head,
        renamed=LATER,
        ignored=(*names.ignored, "memory_cell.mem_map.*"),  # allocated by the authors' code, and not used
        skipped={PREFIX + name: rows for name, rows in names.skipped.items()},
    )


BACKBONES = (("llama", LLAMA), ("mistral", MISTRAL), ("qwen2", QWEN2), ("gpt2", GPT2), ("opt", OPT))
HMTS = {name: _with_memory(format) for name, format in BACKBONES}

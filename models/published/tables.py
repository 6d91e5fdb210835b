"""What the tables of several published formats share: mixers, MLP, norms, dynamics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from models.config import LMConfig
from models.published.blocks import Tensor
from models.published.fields import Fields
from models.published.tensors import Names, Table


@dataclasses.dataclass(frozen=True)
class Format:
    """How one kind of published checkpoint writes its config and names its tensors.

    ``arranged(config, tensors, found)`` gives the tensors of a file with the names ``found`` from those of
    the whole model, where files are cut up.
    """

    fields: Fields
    names: Names
    arranged: Callable[[LMConfig, Iterable[Tensor], Iterable[str]], list[Tensor]] | None = None


def under(prefix: str, table: Table, norm: str) -> dict[str, tuple[str, ...]]:
    """The table of a mixer, its names behind ``prefix``, and the norm before it, as one of a sub-layer."""
    mixer = {prefix + name: tuple(f"mixer.{p}" for p in parts) for name, parts in table.items()}
    return {f"{norm}.weight": ("norm.scale",), f"{norm}.bias": ("norm.bias",), **mixer}


def linear(published: str, *ours: str) -> dict[str, tuple[str, ...]]:
    """A projection and its bias, made of one or several of ours."""
    return {
        f"{published}.weight": tuple(f"{name}.kernel" for name in ours),
        f"{published}.bias": tuple(f"{name}.bias" for name in ours),
    }


MAMBA2 = {
    **linear("in_proj", "in_z", "in_x", "in_B", "in_C", "in_dt"),
    "conv1d.weight": ("conv.x.weight", "conv.B.weight", "conv.C.weight"),
    "conv1d.bias": ("conv.x.bias", "conv.B.bias", "conv.C.bias"),
    "dt_bias": ("dt_bias",),
    "A_log": ("A_log",),
    "D": ("D",),
    "norm.weight": ("norm.scale",),
    **linear("out_proj", "out"),
}
MAMBA = {
    **linear("in_proj", "in_x", "in_z"),
    "conv1d.weight": ("conv.weight",),
    "conv1d.bias": ("conv.bias",),
    "x_proj.weight": ("to_dt.kernel", "to_B.kernel", "to_C.kernel"),
    "dt_proj.weight": ("dt.kernel",),
    "dt_proj.bias": ("dt_bias",),
    "A_log": ("A_log",),
    "D": ("D",),
    **linear("out_proj", "out"),
}
ATTENTION = {
    **linear("q_proj", "q"),
    **linear("k_proj", "k"),
    **linear("v_proj", "v"),
    **linear("o_proj", "out"),
}
MLP = {**linear("gate_proj", "gate"), **linear("up_proj", "up"), **linear("down_proj", "down")}

# Chunk sizes are not read: the result does not depend on them, and ours suits the hardware.
DYNAMICS = {
    "time_step_limit": "mamba2.dt_limit",
    "time_step_min": "mamba2.dt_min",
    "time_step_max": "mamba2.dt_max",
    "time_step_floor": "mamba2.dt_floor",
}
DYNAMICS_DEFAULTS = {
    "time_step_limit": (0.0, math.inf),
    "time_step_min": 1e-3,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
}
PLAIN_VOCABULARY = {"vocab_multiple": 1}  # a config may pad it afterwards

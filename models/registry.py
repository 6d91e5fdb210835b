"""The kinds of sub-layer a pattern can name, and the registry the law suite runs over: two dicts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from layers.attention import Attention, AttentionConfig
from layers.cca import CCAConfig, CoreContextAttention
from layers.dss import DSS, DSSConfig
from layers.mamba import Mamba, MambaConfig
from layers.mamba2 import Mamba2, Mamba2Config
from layers.mlp import MLP
from layers.rope import RopeConfig
from layers.s4 import S4, S4Config
from layers.s4d import S4D, S4DConfig
from layers.s5 import S5, S5Config


@dataclasses.dataclass(frozen=True)
class Kind:
    """A sub-layer: its module, built as ``module(d_model, config, rngs=, init=, out_init=)``.

    ``field`` is the field of ``LMConfig`` that holds its config.
    """

    module: Callable[..., Any]
    field: str


KINDS: dict[str, Kind] = {
    "M": Kind(Mamba2, "mamba2"),
    "m": Kind(Mamba, "mamba"),
    "s": Kind(S5, "s5"),
    "S": Kind(S4, "s4"),
    "D": Kind(S4D, "s4d"),
    "d": Kind(DSS, "dss"),
    "*": Kind(Attention, "attention"),
    "c": Kind(CoreContextAttention, "cca"),
    "-": Kind(MLP, "mlp"),
}


def _attention(**kw: Any) -> AttentionConfig:
    return AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, **kw})


def _build(module: Callable[..., Any], config: Any, rngs: nnx.Rngs) -> Any:
    return module(TINY_D_MODEL, config, rngs=rngs)


# A tiny instance of every mixer, and of every variant whose streaming differs: d_model -> module.
# An architecture added here is held to every law in tests/laws with no new test code.
TINY_D_MODEL = 32
TINY_MIXERS: dict[str, Callable[[nnx.Rngs], Any]] = {
    name: functools.partial(_build, module, config)
    for name, module, config in (
        ("mamba2", Mamba2, Mamba2Config(d_state=16, headdim=8, chunk_size=8)),
        ("mamba2_groups", Mamba2, Mamba2Config(d_state=16, headdim=8, n_groups=2, chunk_size=8)),
        ("mamba", Mamba, MambaConfig(d_state=4)),
        ("s5_zoh", S5, S5Config(d_state=16, blocks=2, activation="full_glu")),
        ("s5_bilinear", S5, S5Config(d_state=8, conj_sym=False, discretization="bilinear")),
        ("s4", S4, S4Config(d_state=8, l_max=16, n_ssm=4)),
        ("s4d_lin", S4D, S4DConfig(d_state=8)),
        ("s4d_real", S4D, S4DConfig(d_state=4, init_A="real", discretization="bilinear", n_ssm=1)),
        ("dss_softmax", DSS, DSSConfig(d_state=4, max_kernel_length=24)),
        ("attention_rope", Attention, _attention(position="rope", qk_norm=True)),
        ("attention_alibi", Attention, _attention(position="alibi", qkv_bias=True)),
        ("attention_window", Attention, _attention(position="rope", rope=RopeConfig(), window=6)),
        (
            "cca",
            CoreContextAttention,
            CCAConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True, group_size=4, window=6),
        ),
    )
}

# The same for mixers that read both ways: tests/laws/test_bidirectional.py.
TINY_BIDIRECTIONAL: dict[str, Callable[[nnx.Rngs], Any]] = {
    name: functools.partial(_build, module, config)
    for name, module, config in (
        ("s4_legt", S4, S4Config(d_state=8, l_max=16, measure="legt", bidirectional=True)),
        ("s4d_legs", S4D, S4DConfig(d_state=8, init_A="legs", dt_transform="exp", bidirectional=True)),
        ("dss_exp", DSS, DSSConfig(d_state=4, kernel_type="exp", sep_dt=False, bidirectional=True)),
        ("s5", S5, S5Config(d_state=8, bidirectional=True)),
    )
}

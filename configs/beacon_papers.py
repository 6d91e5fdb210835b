"""Activation Beacon with the settings of its papers (arXiv:2401.03462, v3 and v1) on 7B backbones.

Command: ``python train.py --config=configs/beacon_papers.py:qwen2 --config.init_from=RUN
    --config.task.source=TOKENS --workdir=...``, RUN the backbone's parameters as a run; then the same with
    ``qwen2,finetune`` and ``--config.init_from`` the first. Backbones: llama2, mistral, qwen2; llama2_v1 is
    the first version, which has one stage.
Hardware: a pod slice; not yet run at this size. Published: LongBench as with full attention fine-tuned at
32K (Llama-2-7B single-document 34.9 against 34.8), the KV cache 8 times smaller.

Beacons alone are trained: 1 G tokens of RedPajama in documents of 2400 to 20480 tokens at ratios 2 to 32,
then 30 K long instructions at 2 to 8; no warm-up, linear decay, batch 8.
"""

import dataclasses

from configs.base import TrainConfig
from configs.beacon import BeaconExperiment
from layers.attention import AttentionConfig
from layers.beacon_ratios import BeaconConfig
from layers.mlp import MLPConfig
from layers.rope import RopeConfig
from models.beacon_config import ADDED, BeaconLMConfig
from runtime.checkpoint import CheckpointConfig
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig
from runtime.schedule import ScheduleConfig
from tasks.lm import LMTaskConfig


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A published model; ``positions`` it was trained for, ``separator`` the id that ends documents."""

    model: BeaconLMConfig
    positions: int
    window: int
    separator: int


def _backbone(
    *, vocab: int, d_model: int, layers: int, heads: tuple[int, int], hidden: int, theta: float, eps: float
) -> BeaconLMConfig:
    """A Llama-like model; ``heads`` of queries and of keys, 128 wide."""
    return BeaconLMConfig(
        vocab_size=vocab,
        d_model=d_model,
        pattern=f"(*-){layers}",
        norm_eps=eps,
        tie_embeddings=False,
        attention=AttentionConfig(
            num_heads=heads[0], num_kv_heads=heads[1], head_dim=128, rope=RopeConfig(theta), norm_eps=eps
        ),
        mlp=MLPConfig(hidden=hidden),
        init_std=0.02,
        dtype="bfloat16",
        remat="full",
    )


def _backbones() -> dict[str, Backbone]:
    llama = _backbone(
        vocab=32_000, d_model=4096, layers=32, heads=(32, 32), hidden=11_008, theta=1e4, eps=1e-5
    )
    mistral = _backbone(
        vocab=32_000, d_model=4096, layers=32, heads=(32, 8), hidden=14_336, theta=1e6, eps=1e-5
    )
    qwen = _backbone(
        vocab=152_064, d_model=3584, layers=28, heads=(28, 4), hidden=18_944, theta=1e6, eps=1e-6
    )
    qwen.attention.qkv_bias = True
    return {
        "llama2": Backbone(llama, positions=4096, window=1024, separator=2),
        "mistral": Backbone(mistral, positions=32_768, window=2048, separator=2),
        "qwen2": Backbone(qwen, positions=32_768, window=2048, separator=151_645),
        "llama2_v1": Backbone(llama, positions=4096, window=1024, separator=2),
    }


def get_config(arg: str = "llama2") -> BeaconExperiment:
    """Raises ValueError for a backbone or a stage that does not exist."""
    name, _, stage = arg.partition(",")
    backbones, first = _backbones(), name == "llama2_v1"
    if name not in backbones or stage not in ("", "finetune") or (first and stage):
        raise ValueError(
            f"configs/beacon_papers.py:{arg}: expected one of {', '.join(backbones)}, and ',finetune' after "
            "any but the last for the second stage"
        )
    b = backbones[name]
    ratios = (2, 4, 8) if stage else (2, 4, 8, 16, 32)
    b.model.beacon = BeaconConfig(
        window=b.window,
        ratios=(2, 4, 8, 16, 32, 64, 128) if first else ratios,
        eval_ratios=(2, 4, 8, 16, 32),
        eval_mix="adapt-1024",
        variant="step-expansion" if first else "interleaved",
        own_out=first,
        positions=b.positions,
        init_id=b.separator,
    )
    length, steps = (8192, 10_000) if first else (20_480, 3_750 if stage else 6_104)
    return BeaconExperiment(
        name=f"beacon_papers:{arg}",
        model=b.model,
        task=LMTaskConfig(
            source="data/tokens/*.bin",
            token_dtype="uint32",
            vocab_size=b.model.vocab_size,
            separator_id=b.separator,
            seq_len=length,
            batch_size=8,
        ),
        optim=OptimConfig(
            lr=1e-5 if stage else 5e-5,
            b2=0.999,
            weight_decay=0.0,
            schedule=ScheduleConfig(kind="linear"),
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=500),
        train=TrainConfig(steps=steps, eval_every=500, unfreeze=ADDED),
    )

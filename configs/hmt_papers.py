"""HMT with the settings of its paper (arXiv:2405.06067) on OPT-350M, OPT-2.7B, OpenLLaMA-3B and Llama-2-7B.

Command: ``python train.py --config=configs/hmt_papers.py:llama2_7b,1 --config.init_from=RUN
    --config.init.exclude='("memory/*",)' --config.task.source=TOKENS --workdir=...``, RUN the backbone's
    parameters as a run; then ``llama2_7b,2`` with ``--config.init_from`` the first, and no exclude.
    The other backbones: opt_350m, opt_2_7b, openllama_3b.
Hardware: not run here. Metric: none of ours; theirs, Wikitext-103 in texts of 30 K tokens, is a perplexity of
8.61 for OPT-2.7B with HMT and 12.12 without, and 13.67 for OPT-350M with it (from a third party's notes).

Stage 1: 200 updates over rows of 2 segments, no recall; stage 2: 500 over as many segments as there was
memory for. The loss is that of the last segment. Their rate falls by a step every 100 updates, here linearly
between the same ends; their rows overlap in all segments but one, here they do not.

OPT-350M is published with norms behind its sub-layers and an embedding of half its width: here it is a model
of the same size with neither, which its weights do not fit. The others' do; OPT's table of positions is used
from row 2 on.
"""

import dataclasses
import math

from configs.base import TrainConfig
from configs.hmt import UNUSED_WITHOUT_RECALL, HMTExperiment
from layers.attention import AttentionConfig
from layers.mlp import MLPConfig
from models.hmt_config import HMTConfig, MemoryConfig
from models.lora import LoRAConfig
from runtime.checkpoint import CheckpointConfig
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig
from runtime.schedule import ScheduleConfig
from tasks.lm import LMTaskConfig

SENSORY, QUEUE, RECALL_DIM = 32, 300, 4096
STEPS = {"1": 200, "2": 500}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A published model and how it was trained.

    Attributes:
        input: slots of a segment, S + k + 2.
        segments: of a row in stage 2.
        lora: adapters of rank 8 in place of all of its parameters.
        fall: factor of the rate every 100 updates.
    """

    model: HMTConfig
    input: int
    segments: int
    lora: bool = False
    fall: float = 0.9


def _opt(d_model: int, layers: int, heads: int) -> HMTConfig:
    return HMTConfig(
        vocab_size=50_272,
        d_model=d_model,
        pattern=f"(*-){layers}",
        norm="layer",
        max_positions=2048,
        attention=AttentionConfig(num_heads=heads, position="none", qkv_bias=True, out_bias=True),
        mlp=MLPConfig(hidden=4 * d_model, activation="relu", use_bias=True),
    )


def _llama(d_model: int, layers: int, hidden: int, eps: float) -> HMTConfig:
    return HMTConfig(
        vocab_size=32_000,
        d_model=d_model,
        pattern=f"(*-){layers}",
        norm_eps=eps,
        tie_embeddings=False,
        attention=AttentionConfig(num_heads=32, norm_eps=eps),
        mlp=MLPConfig(hidden=hidden),
    )


def _backbones() -> dict[str, Backbone]:
    return {
        "opt_350m": Backbone(_opt(1024, 24, 16), input=1024, segments=15),
        "opt_2_7b": Backbone(_opt(2560, 32, 32), input=512, segments=8),
        "openllama_3b": Backbone(_llama(3200, 26, 8640, 1e-6), input=512, segments=8),
        "llama2_7b": Backbone(_llama(4096, 32, 11_008, 1e-5), input=256, segments=8, lora=True, fall=0.7),
    }


def get_config(arg: str = "llama2_7b,2") -> HMTExperiment:
    """Raises ValueError for a backbone or a stage that does not exist."""
    name, _, stage = arg.partition(",")
    backbones = _backbones()
    if name not in backbones or stage not in STEPS:
        raise ValueError(
            f"configs/hmt_papers.py:{arg}: expected BACKBONE,STAGE with one of {', '.join(backbones)} and a "
            "stage of 1 or 2"
        )
    b, first = backbones[name], stage == "1"
    model = b.model
    model.init_std, model.dtype, model.remat = 0.02, "bfloat16", "full"
    model.memory = MemoryConfig(
        segment=b.input - SENSORY - 2,
        sensory=SENSORY,
        recall="last" if first else "attention",
        queue=QUEUE,
        recall_dim=RECALL_DIM,
    )
    everything = ("embed/table", "all")
    frozen = UNUSED_WITHOUT_RECALL if first else ()
    read = ("base/memory/prompt",) if first else ("base/memory/*",)
    return HMTExperiment(
        name=f"hmt_papers:{arg}",
        model=model,
        loss_segments=1,
        task=LMTaskConfig(
            source="data/tokens/*.bin",
            vocab_size=model.vocab_size,
            packing="stream",
            seq_len=(2 if first else b.segments) * model.memory.segment,
            batch_size=2,
        ),
        lora=LoRAConfig(rank=8, alpha=32.0, targets=everything) if b.lora else LoRAConfig(),
        optim=OptimConfig(
            lr=1e-4 if b.lora else 1e-5,
            b2=0.999,
            weight_decay=0.01,
            schedule=ScheduleConfig(kind="linear", end_factor=b.fall ** math.ceil(STEPS[stage] / 100 - 1)),
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=100),
        train=TrainConfig(
            steps=STEPS[stage],
            eval_every=100,
            freeze=frozen,
            unfreeze=read if b.lora else (),
        ),
    )

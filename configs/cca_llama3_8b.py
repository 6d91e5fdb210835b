"""Llama-3-8B with core-context-aware attention at 128K tokens: group 16, window 1024 (arXiv:2412.12465).

Command: ``python train.py --config=configs/cca_llama3_8b.py --config.task.source=TOKENS
    --config.init_from=RUN --workdir=RUN2`` with RUN a workdir that holds the imported weights (same names as
    with ``model.pattern=(*-)32``).
Hardware: a pod slice; not yet run at this size.

Not a setting of the paper, which has Llama-2-7B at 128K: the shape is that of Llama-3.1-8B, which was trained
for as many positions, so that the rotations stay as they are. Recipe as in configs/cca_llama2_7b.py.
"""

from configs.base import Experiment, TrainConfig
from layers.cca import CCAConfig
from layers.mlp import MLPConfig
from layers.rope import RopeConfig
from models.config import LMConfig
from runtime.checkpoint import CheckpointConfig
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig
from runtime.schedule import ScheduleConfig
from tasks.lm import LMTaskConfig


def get_config() -> Experiment:
    rope = RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_max_position=8192)
    return Experiment(
        name="cca_llama3_8b",
        model=LMConfig(
            vocab_size=128_256,
            d_model=4096,
            pattern="(c-)32",
            cca=CCAConfig(num_heads=32, num_kv_heads=8, head_dim=128, rope=rope, group_size=16, window=1024),
            mlp=MLPConfig(hidden=14_336, activation="swiglu"),
            tie_embeddings=False,
            init_std=0.02,
            dtype="bfloat16",
            remat="full",
            loss_chunks=8,
        ),
        task=LMTaskConfig(
            source="data/tokens/*.bin",
            token_dtype="uint32",
            vocab_size=128_256,
            seq_len=131_072,
            batch_size=8,
        ),
        optim=OptimConfig(lr=2e-5, b2=0.95, schedule=ScheduleConfig(kind="constant", warmup_steps=20)),
        mesh=MeshConfig(data=1, fsdp=-1, sequence=16),
        checkpoint=CheckpointConfig(every=200),
        train=TrainConfig(steps=1000, eval_every=200),
    )

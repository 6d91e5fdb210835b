"""A small hybrid of Mamba-2 and attention learns Python from the standard library's own source.

Command: ``make quickstart``, or ``python train.py --config=configs/quickstart.py --workdir=runs/quickstart``
Hardware: 2 CPU cores. Wall time and metric: see the README's first table.
"""

from configs.base import Experiment, TrainConfig
from layers.attention import AttentionConfig
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from models.config import LMConfig
from runtime.checkpoint import CheckpointConfig
from runtime.optimizer import OptimConfig
from runtime.schedule import ScheduleConfig
from tasks.lm import LMTaskConfig


def get_config() -> Experiment:
    """The experiment of ``make quickstart``."""
    return Experiment(
        name="quickstart",
        model=LMConfig(
            d_model=128,
            pattern="M-*-M",
            mamba2=Mamba2Config(d_state=32, chunk_size=64),
            attention=AttentionConfig(num_heads=2, num_kv_heads=2, position="rope", qk_norm=True),
            mlp=MLPConfig(hidden=384, activation="swiglu"),
            tie_embeddings=False,
        ),
        task=LMTaskConfig(source="stdlib", seq_len=256, batch_size=8, eval_batch_size=32),
        optim=OptimConfig(
            name="muon",
            muon_lr=0.015,
            muon_weight_decay=0.05,
            lr=0.006,
            b2=0.98,
            schedule=ScheduleConfig(kind="linear", warmup_fraction=0.02),
        ),
        checkpoint=CheckpointConfig(every=1000),
        train=TrainConfig(
            steps=4000, eval_every=1000, baselines=True, sample_prompt="def read(self, ", sample_length=600
        ),
    )

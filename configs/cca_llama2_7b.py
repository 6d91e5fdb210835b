"""Llama-2-7B with core-context-aware attention at 32K tokens: group 16, window 1024 (arXiv:2412.12465).

Command: ``python train.py --config=configs/cca_llama2_7b.py --config.task.source=TOKENS
    --config.init_from=RUN --workdir=RUN2`` with RUN a workdir that holds the imported weights (same names as
    with ``model.pattern=(*-)32``).
Hardware: a pod slice; not yet run at this size. Published (LongBench-E, a model of 32K tokens): 21.86 on
average, full attention 22.11; first token at 32K 3.5 times as fast; at 128K 7 % of the key/value cache.

The authors' code is not public. 1000 updates are from their command line; rate, batch, warm-up and the linear
stretch of the rotations are those of LongLoRA, whose trainer they name. All parameters train.
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

PRETRAINED, SEQ_LEN = 4096, 32_768


def get_config() -> Experiment:
    """The experiment; its data are to be given (``task.source``)."""
    rope = RopeConfig(scaling="linear", factor=SEQ_LEN / PRETRAINED, original_max_position=PRETRAINED)
    return Experiment(
        name="cca_llama2_7b",
        model=LMConfig(
            vocab_size=32_000,
            d_model=4096,
            pattern="(c-)32",
            cca=CCAConfig(num_heads=32, head_dim=128, rope=rope, group_size=16, window=1024),
            mlp=MLPConfig(hidden=11_008, activation="swiglu"),
            tie_embeddings=False,
            init_std=0.02,
            dtype="bfloat16",
            remat="full",
        ),
        task=LMTaskConfig(
            source="data/tokens/*.bin",
            token_dtype="uint16",
            vocab_size=32_000,
            seq_len=SEQ_LEN,
            batch_size=64,
        ),
        optim=OptimConfig(lr=2e-5, b2=0.95, schedule=ScheduleConfig(kind="constant", warmup_steps=20)),
        mesh=MeshConfig(data=1, fsdp=-1),
        checkpoint=CheckpointConfig(every=200),
        train=TrainConfig(steps=1000, eval_every=200),
    )

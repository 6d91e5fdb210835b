"""The quickstart's hybrid, larger and for an hour: 2 M parameters, context 1024, 41 M bytes of Python.

Command: ``python train.py --config=configs/hybrid_stdlib.py --workdir=runs/hybrid_stdlib``
Hardware: 2 CPU cores, about an hour (from steps timed apart; recorded on one busy core).
Metric: validation bits per byte 1.164, seed 0.
"""

from configs.base import Experiment, TrainConfig
from configs.quickstart import get_config as quickstart
from runtime.checkpoint import CheckpointConfig


def get_config() -> Experiment:
    """The quickstart's recipe with more layers, context and steps."""
    config = quickstart()
    config.name = "hybrid_stdlib"
    config.model.d_model = 192
    config.model.pattern = "M-M-*-M-"
    config.model.mlp.hidden = 512
    config.model.mamba2.d_state = 64
    config.model.attention.num_heads = config.model.attention.num_kv_heads = 3
    config.task.seq_len, config.task.batch_size = 1024, 4
    config.task.eval_batch_size = 16
    config.optim.lr = 0.004
    config.checkpoint = CheckpointConfig(every=1000)
    config.train = TrainConfig(
        steps=10000, eval_every=2000, baselines=True, sample_prompt="def read(self, ", sample_length=600
    )
    return config

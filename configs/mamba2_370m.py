"""Mamba-2 370M: 48 layers, d_model 1024 (arXiv:2405.21060).

Command: ``python train.py --config=configs/mamba2_370m.py --config.task.source=TOKENS --workdir=RUN``
Hardware: accelerators; not yet run at this size. Published: 300 B tokens of the Pile, sequence length 2048.
The peak learning rate is about five times that of GPT-3 at this size.
"""

from configs.base import Experiment
from configs.mamba2 import TOKENS_PER_BATCH, published


def get_config() -> Experiment:
    """48 layers of width 1024."""
    return published(
        "mamba2_370m", n_layer=48, d_model=1024, lr=0.0015, steps=300 * 10**9 // TOKENS_PER_BATCH
    )

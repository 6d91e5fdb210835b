"""Mamba-2 2.7B: 64 layers, d_model 2560 (arXiv:2405.21060).

Command: ``python train.py --config=configs/mamba2_2_7b.py[:LENGTH] --config.task.source=TOKENS
    --workdir=RUN``
Hardware: a pod slice; not yet run at this size, but compiled for TPU v5e:16x16 (RESULTS.md, Pod check).
Published: 300 B tokens of the Pile, sequence length 2048. With another LENGTH a batch has as many tokens.
The peak learning rate is about five times that of GPT-3 at this size.
"""

from configs.base import Experiment
from configs.mamba2 import SEQ_LEN, TOKENS_PER_BATCH, published


def get_config(seq_len: str = str(SEQ_LEN)) -> Experiment:
    return published(
        "mamba2_2_7b",
        n_layer=64,
        d_model=2560,
        lr=0.0008,
        steps=300 * 10**9 // TOKENS_PER_BATCH,
        seq_len=int(seq_len),
    )

"""The 8B Mamba-2-Hybrid of "An Empirical Study of Mamba-based Language Models" (arXiv:2406.07887): 8.655 B.

Command: ``python train.py --config=configs/mamba2_hybrid_8b.py[:LENGTH] --config.task.source=TOKENS
    --workdir=RUN``, LENGTH one of 4096, 8192, 32768, 131072; a batch has as many tokens
Hardware: a pod slice; not yet run at this size. Published: 3.5 T tokens, sequence length 4096, batch 1024.
24 Mamba-2, 4 attention (no positions) and 28 MLP sub-layers; 256k SentencePiece vocabulary, untied.
"""

from configs.base import Experiment, TrainConfig
from layers.attention import AttentionConfig
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from models.config import LMConfig
from runtime.checkpoint import CheckpointConfig
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig
from runtime.schedule import ScheduleConfig
from tasks.lm import LMTaskConfig

PATTERN = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"


# Devices that share the time of a row, by its length.
SEQUENCE = {4096: 2, 8192: 4, 32_768: 8, 131_072: 16}
TOKENS = 1024 * 4096  # of a batch


def get_config(seq_len: str = "4096") -> Experiment:
    """Raises ValueError for a length that has no mesh."""
    length = int(seq_len)
    if length not in SEQUENCE:
        raise ValueError(
            f"configs/mamba2_hybrid_8b.py:{seq_len}: expected one of {', '.join(map(str, SEQUENCE))}"
        )
    return Experiment(
        name=f"mamba2_hybrid_8b:{length}",
        model=LMConfig(
            vocab_size=256_000,
            d_model=4096,
            pattern=PATTERN,
            mamba2=Mamba2Config(d_state=128, headdim=64, n_groups=8, chunk_size=128),
            attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, position="none"),
            mlp=MLPConfig(hidden=16_384, activation="gelu"),
            tie_embeddings=False,
            init_std=0.02,
            dtype="bfloat16",
            remat="full",
            loss_chunks=8,  # of 512 MiB of logits a device; the head's gradient is summed as often
        ),
        task=LMTaskConfig(
            source="data/tokens/*.bin",
            token_dtype="uint32",
            vocab_size=256_000,
            seq_len=length,
            batch_size=TOKENS // length,
        ),
        optim=OptimConfig(
            lr=3e-4,
            weight_decay=0.1,
            accumulation=4,
            schedule=ScheduleConfig(kind="cosine", warmup_fraction=0.001, end_factor=0.1),
        ),
        mesh=MeshConfig(data=1, fsdp=-1, sequence=SEQUENCE[length]),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
        train=TrainConfig(steps=3_500_000_000_000 // TOKENS, eval_every=1000),
    )

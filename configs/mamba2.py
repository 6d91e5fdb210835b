"""What the published Mamba-2 language models share (arXiv:2405.21060); configs/mamba2_*.py are the sizes."""

from configs.base import Experiment, TrainConfig
from layers.mamba2 import Mamba2Config
from models.config import LMConfig
from runtime.checkpoint import CheckpointConfig
from runtime.mesh import MeshConfig
from runtime.optimizer import GroupConfig, OptimConfig
from runtime.schedule import ScheduleConfig
from tasks.lm import LMTaskConfig

TOKENS_PER_BATCH = 2**19
SEQ_LEN = 2048


def published(
    name: str, n_layer: int, d_model: int, lr: float, steps: int, seq_len: int = SEQ_LEN
) -> Experiment:
    """A published size: d_state 128, headdim 64, one group, GPT-NeoX vocabulary padded to 50288.

    Rows longer than the published 2048 tokens are fewer in a batch, and 2048 tokens are on a device.

    The text is yours: point ``task.source`` at token arrays of that tokenizer. ``steps`` is the number of
    updates of 2**19 tokens.
    """
    return Experiment(
        name=name,
        model=LMConfig(
            vocab_size=50277,
            vocab_multiple=16,
            d_model=d_model,
            pattern=f"(M){n_layer}",
            mamba2=Mamba2Config(chunk_size=256),
            dtype="bfloat16",
            remat="dots",
        ),
        task=LMTaskConfig(
            source="data/pile/*.bin",
            token_dtype="uint16",
            vocab_size=50277,
            seq_len=seq_len,
            batch_size=TOKENS_PER_BATCH // seq_len,
        ),
        optim=OptimConfig(
            lr=lr,
            b2=0.95,
            weight_decay=0.1,
            clip_norm=1.0,
            groups={"embedding": GroupConfig(weight_decay=0.1)},
            schedule=ScheduleConfig(kind="cosine", warmup_fraction=0.01, end_factor=1e-5 / lr),
        ),
        mesh=MeshConfig(data=1, fsdp=-1, sequence=max(seq_len // SEQ_LEN, 1)),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
        train=TrainConfig(steps=steps, eval_every=1000),
    )

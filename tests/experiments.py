"""A tiny experiment on a tiny corpus: every part real, seconds on a CPU."""

import pathlib

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


def write_corpus(directory: pathlib.Path) -> pathlib.Path:
    """Forty small text files of a few hundred bytes each."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(40):
        words = " ".join(f"word{(i * j) % 17}" for j in range(30 + 3 * i))
        (directory / f"file{i:02d}.txt").write_text(f"document {i}\n{words}\n")
    return directory


def tiny(corpus: pathlib.Path, *, steps: int = 8, mesh: MeshConfig | None = None) -> Experiment:
    """A hybrid of three kinds of sub-layer, one of them scanned; batch 8, length 32, on one device."""
    return Experiment(
        name="tiny",
        model=LMConfig(
            d_model=32,
            pattern="MM*-",
            mamba2=Mamba2Config(d_state=16, headdim=8, n_groups=2, chunk_size=8),
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=24),
            mlp=MLPConfig(hidden=64),
            tie_embeddings=False,
        ),
        task=LMTaskConfig(
            source=str(corpus),
            seq_len=32,
            batch_size=8,
            cache_dir=str(corpus.parent / "cache"),
            eval_batches=2,
        ),
        optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=2)),
        mesh=mesh or MeshConfig(data=1),
        checkpoint=CheckpointConfig(every=4),
        train=TrainConfig(steps=steps, log_every=1),
    )

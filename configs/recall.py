"""An experiment on generated recall tasks, and small models of every kind to compare on them."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
from typing import ClassVar

from configs.base import BaseExperiment
from layers.attention import AttentionConfig
from layers.cca import CCAConfig
from layers.mamba2 import Mamba2Config
from layers.mlp import MLPConfig
from layers.s4d import S4DConfig
from layers.s5 import S5Config
from models.config import LMConfig
from runtime.checkpoint import CheckpointConfig
from runtime.optimizer import OptimConfig
from runtime.schedule import ScheduleConfig
from tasks.recall import RecallTaskConfig


@dataclasses.dataclass
class RecallExperiment(BaseExperiment):
    """A run of `objectives.recall.Recall`.

    Attributes:
        stop_accuracy: the run ends at the evaluation that reaches it; None: never.
    """

    kind: ClassVar[str] = "recall"

    model: LMConfig = dataclasses.field(default_factory=LMConfig)
    task: RecallTaskConfig = dataclasses.field(default_factory=RecallTaskConfig)
    stop_accuracy: float | None = None

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        self.model.validate()
        self.task.validate()
        super().validate()
        if self.stop_accuracy is not None and not 0 < self.stop_accuracy <= 1:
            raise ValueError(f"stop_accuracy={self.stop_accuracy} must be above 0 and at most 1, or None")


# Two mixers, each with an MLP.
PATTERNS = {
    "attention": "*-*-",
    "mamba2": "M-M-",
    "mamba": "m-m-",
    "hybrid": "M-*-",
    "s4d": "D-D-",
    "s5": "s-s-",
    "cca": "c-c-",
}


def small_model(name: str, vocab_size: int, d_model: int = 128) -> LMConfig:
    """A model of :data:`PATTERNS`, or of the pattern that ``name`` is."""
    heads = max(d_model // 64, 1)
    return LMConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        pattern=PATTERNS.get(name, name),
        mamba2=Mamba2Config(d_state=64, headdim=min(64, d_model), chunk_size=64),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, position="rope"),
        cca=CCAConfig(num_heads=heads, num_kv_heads=heads, group_size=8, window=32),
        s4d=S4DConfig(d_state=64),
        s5=S5Config(d_state=d_model),
        mlp=MLPConfig(hidden=2 * d_model),
    )


def experiment(
    name: str, model: LMConfig, task: RecallTaskConfig, *, steps: int, lr: float, decay: float = 0.1
) -> RecallExperiment:
    """AdamW with a warm-up and a cosine, evaluated ten times."""
    config = RecallExperiment(name=name, model=model, task=task)
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.05, end_factor=0.0)
    config.optim = OptimConfig(lr=lr, weight_decay=decay, schedule=schedule)
    every = max(steps // 10, 1)
    config.checkpoint = CheckpointConfig(every=every)
    config.train.steps, config.train.eval_every = steps, every
    return config


def parse(file: str, argument: str, choices: list[str]) -> tuple[str, str]:
    """(which of ``choices``, model) from "CHOICE[,MODEL]". Raises ValueError naming what there is."""
    choice, _, model = argument.partition(",")
    model = model or "attention"
    if choice not in choices or (model not in PATTERNS and not set(model) <= set("MmsSDd*c-()0123456789")):
        raise ValueError(
            f"configs/{file}.py:{argument}: expected WHAT,MODEL with WHAT one of {', '.join(choices)} and "
            f"MODEL one of {', '.join(PATTERNS)}, or a pattern"
        )
    return choice, model

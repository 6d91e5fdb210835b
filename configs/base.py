"""An experiment: every setting of a run, as one tree of dataclasses that the command line can override."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import dataclasses
import json
from typing import TYPE_CHECKING, Any, ClassVar

from models.config import LMConfig
from models.lora import LoRAConfig
from runtime.checkpoint import CheckpointConfig
from runtime.mesh import MeshConfig
from runtime.optimizer import OptimConfig
from runtime.processes import DistributedConfig
from runtime.warm_start import InitConfig
from tasks.lm import LMTaskConfig


class ConfigError(ValueError):
    """A setting cannot work; the message names it."""


@dataclasses.dataclass
class TrainConfig:
    """The loop.

    Attributes:
        steps: optimizer updates in all.
        seed: of initialisation and dropout (the data order has its own, ``task.seed``).
        log_every: steps between metric records.
        eval_every: steps between evaluations; 0 evaluates at the end only.
        freeze: glob patterns on paths of parameters that stay as they are (WORKDIR/parameters.txt has all;
            "*" crosses "/").
        unfreeze: these train and, but for LoRA's adapters, no others; () for all that nothing freezes.
        nonfinite: "stop" ends the run at the first non-finite loss or gradient, "skip" drops that update.
        matmul_precision: of float32 matmuls on accelerators: "default", "high", "highest" or "tensorfloat32".
        profile_at, profile_steps: trace this many steps from this step on into WORKDIR/profile; 0 for none.
        wandb: project to log to as well, "" for none.
        baselines: at the end, compare with n-gram models and xz on the same split (byte corpora only).
        sample_prompt, sample_length: continuation written at the end; length 0 for none.
    """

    steps: int = 1000
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    freeze: tuple[str, ...] = ()
    unfreeze: tuple[str, ...] = ()
    nonfinite: str = "stop"
    matmul_precision: str = "default"
    profile_at: int = 0
    profile_steps: int = 0
    wandb: str = ""
    baselines: bool = False
    sample_prompt: str = "def "
    sample_length: int = 0


@dataclasses.dataclass
class BaseExperiment:
    """A whole run, but for its model and its task. Derived sizes are properties, never stored.

    ``name`` is free text. ``init_from`` is another run, RUN or RUN@STEP, whose parameters a fresh workdir
    starts with: all that ``init`` lets in. ``lora`` puts adapters beside matrices and freezes the rest.
    """

    kind: ClassVar[str] = ""
    """Names the model and the objective in `objectives`; a run keeps it in its config.json."""

    if TYPE_CHECKING:  # each kind of experiment has its own
        model: Any
        task: Any

    name: str = "experiment"
    init_from: str = ""
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def to_json(self) -> str:
        """The kind and every field, as indented JSON (infinities as strings)."""
        return json.dumps(_plain({"kind": self.kind, **dataclasses.asdict(self)}), indent=2)

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        if self.train.steps < 1:
            raise ValueError(f"train.steps={self.train.steps} must be at least 1")
        if self.train.nonfinite not in ("stop", "skip"):
            raise ValueError(f"train.nonfinite={self.train.nonfinite!r} is unknown; use 'stop' or 'skip'")
        if self.train.log_every < 1:
            raise ValueError(f"train.log_every={self.train.log_every} must be at least 1")
        if self.init != InitConfig() and not self.init_from:
            raise ValueError(f"{self.init} is set, but init_from names no run to read")


@dataclasses.dataclass
class Experiment(BaseExperiment):
    """A language model on text: a run of `objectives.language.LanguageModelling`."""

    kind: ClassVar[str] = "lm"

    model: LMConfig = dataclasses.field(default_factory=LMConfig)
    task: LMTaskConfig = dataclasses.field(default_factory=LMTaskConfig)

    def validate(self) -> None:
        """Raises ValueError naming the first field whose value cannot work, and what would."""
        self.model.validate()
        super().validate()
        if self.task.carry_state and self.model.state_grows:
            raise ValueError(
                "task.carry_state=True with full attention, or cores of all the past, would carry a cache "
                "without end; set model.attention.window, or task.carry_state=False"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value

"""A run opened for reading: its config, its model with the parameters of a checkpoint, its tokenizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from configs.base import BaseExperiment, ConfigError
from configs.saved import from_json
from eval import calibrated
from models.classifier import Classifier
from models.functional import Functional
from objectives import model_of
from runtime import mesh as meshes
from runtime import run_record
from runtime.checkpoint import Checkpoints
from tasks import bpe
from tasks.lm import LMTaskConfig
from tasks.tokenizer import Tokenizer


class RunError(RuntimeError):
    """A workdir cannot be used as a run; the message says what is missing, and where."""


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """What generation, probes and reports read.

    Attributes:
        step: of the checkpoint that ``params`` are from.
        params: the moving average of the parameters where the run keeps one.
        carry: running statistics of batch norms, None for a model without.
        tokenizer: None for a run on token arrays that came without one.
        mesh: that the parameters lie on.
    """

    workdir: epath.Path
    config: Any  # a `configs.base.BaseExperiment`
    step: int
    model: Functional
    params: Any
    carry: Any
    tokenizer: Tokenizer | None
    mesh: jax.sharding.Mesh

    def need_tokenizer(self) -> Tokenizer:
        """Raises RunError if the run has none."""
        if self.tokenizer is None:
            raise RunError(
                f"{self.workdir}: the run was trained on token arrays without a tokenizer (there is no "
                "tokenizer.json in it), so text cannot be turned into ids; give ids instead"
            )
        return self.tokenizer


def load_config(workdir: epath.PathLike) -> Any:
    """The config that the run was last started with.

    Raises:
        RunError: ``workdir`` does not exist or holds no config.
        ConfigError: the config cannot be read.
    """
    workdir = epath.Path(workdir)
    if not workdir.exists():
        raise RunError(f"{workdir} does not exist; give the --workdir of a training run")
    text = run_record.load_config(workdir)
    if text is None:
        there = ", ".join(sorted(p.name for p in workdir.iterdir())[:8]) or "nothing"
        raise RunError(f"{workdir} is no run: it has no config.json (found: {there})")
    return from_json(text, str(workdir / "config.json"))


def open_run(
    workdir: epath.PathLike,
    step: int | None = None,
    *,
    mesh: meshes.MeshConfig | None = None,
    config: BaseExperiment | None = None,
) -> OpenRun:
    """The run in ``workdir`` at its newest readable checkpoint, or that of ``step``.

    Args:
        mesh: over all devices; None puts everything on the first.
        config: in place of the run's own, to read its parameters into a model that differs in what has no
            parameters (a longer context, another RoPE scaling).

    Raises:
        RunError: there is no run or no checkpoint, or the tokenizer has more ids than the model.
        ConfigError, ArchitectureError, CheckpointError: as when training resumes; ConfigError also where
            ``config`` switches something on that the run is not calibrated for (``eval.calibrate``).
    """
    workdir = epath.Path(workdir)
    config = config or load_config(workdir)
    tokenizer = bpe.of_run(workdir, config.task) if isinstance(config.task, LMTaskConfig) else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise RunError(
            f"{workdir}: the tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size is "
            f"{config.model.vocab_size}; tokenizer.json is not the one the run was trained with"
        )
    try:
        config.model.validate()
        model = model_of(config)
        devices = jax.devices() if mesh else jax.local_devices()[:1]
        over = meshes.make_mesh(mesh or meshes.MeshConfig(), devices)
        shardings = meshes.param_shardings(over, model.axes, model.shapes)
    except ValueError as error:
        raise ConfigError(f"{workdir}: {error}") from error
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), model.shapes, shardings
    )
    averaged = config.optim.ema_decay is not None
    measured = calibrated.calibrated_paths(model.roles)
    saved = calibrated.without(abstract, measured)
    wanted: dict[str, Any] = {"extras": {"ema": saved}} if averaged else {"params": saved}
    carry = model_stats(model, over)
    if carry is not None:
        wanted.setdefault("extras", {})["carry"] = carry
    with Checkpoints(workdir) as checkpoints:
        try:
            part, found = checkpoints.restore_part(wanted, step)
        except FileNotFoundError as error:
            raise RunError(f"{workdir}: {error}. Train it first, or wait for its first save") from error
    params = part["extras"]["ema"] if averaged else part["params"]
    try:
        params = calibrated.completed(params, abstract, measured, workdir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    carry = None if carry is None else part["extras"]["carry"]
    return OpenRun(workdir, config, found, model, params, carry, tokenizer, over)


def model_stats(model: Functional, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, whole on every device, of the running statistics in a checkpoint of the model, or None."""
    module = model.bind(model.shapes)
    if not isinstance(module, Classifier):
        return None
    stats = jax.eval_shape(module.init_stats)
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), stats)
    return shapes if jax.tree.leaves(shapes) else None

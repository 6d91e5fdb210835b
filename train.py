"""Train: ``python train.py --config=configs/NAME.py[:ARG] [--config.FIELD=VALUE ...] --workdir=RUN``.

Resumes if RUN holds a checkpoint. From Python: ``train.run(config, workdir)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from configs import overrides
from configs.base import BaseExperiment, ConfigError
from eval.curves import read_evaluations
from eval.finish import finish
from eval.heldout import EvalStep, evaluate, make_eval_step
from eval.source_run import start_from
from models.functional import Functional, parameter_count
from objectives import model_of, objective_of
from objectives.types import Objective
from runtime import mesh as meshes
from runtime import run_record
from runtime.checkpoint import CheckpointError, Checkpoints
from runtime.clock import Clock, mfu, peak_flops
from runtime.feed import DataError, Feed, local_rows
from runtime.freeze import freeze
from runtime.host import restart_with_tuned_malloc
from runtime.optimizer import format_table, group_table, make_optimizer, trained_parameters
from runtime.preemption import Preemption
from runtime.processes import DistributedError, initialize_distributed, leaving_at_once
from runtime.progress import Progress
from runtime.restore import ArchitectureError
from runtime.schedule import update_plateau
from runtime.state import TrainState, init_state
from runtime.step import NonFiniteError, TrainStep, make_train_step, parameter_paths
from runtime.writers import Writers, open_writers

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: configs/NAME.py[:ARG].")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run, local or gs://.")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed before the first step: no array of the run exists yet."""

    config: BaseExperiment
    mesh: jax.sharding.Mesh
    model: Functional
    objective: Objective
    abstract: TrainState  # shapes with shardings
    init: Callable[[jax.Array], TrainState]
    train_step: TrainStep
    eval_step: EvalStep


def make_loss(model: Functional, objective: Objective) -> Callable[..., Any]:
    """``(params, batch, carry, key) -> ((loss_sum, weight), (carry, metrics))`` for ``make_train_step``."""
    return lambda params, batch, carry, key: objective.loss(model.bind(params), batch, carry, key)


def setup(config: BaseExperiment, devices: Sequence[jax.Device] | None = None) -> Setup:
    """Mesh (of ``devices``, or all), data, model, optimizer and compiled functions; no arrays yet.

    Raises:
        ConfigError: what cannot work: unknown names, sizes that do not divide, missing or too little data.
    """
    try:
        config.validate()
        mesh = meshes.make_mesh(config.mesh, devices)
        objective = objective_of(config, mesh)
        model = model_of(config)
        roles = freeze(model.roles, config.train.freeze, config.train.unfreeze)
        model = dataclasses.replace(model, roles=roles)
        param_shardings = meshes.param_shardings(mesh, model.axes, model.shapes)
        optim = dataclasses.replace(config.optim, skip_nonfinite=config.train.nonfinite == "skip")
        trained = trained_parameters(optim, roles, model.axes, model.shapes)
        tx = make_optimizer(optim, roles, model.axes, model.shapes, config.train.steps)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error

    module = model.bind(model.shapes)

    def init(key: jax.Array) -> TrainState:
        return init_state(model.init(key), tx, optim, objective.init_carry(module))

    shapes = jax.eval_shape(init, jax.random.key(0))
    carry, carry_axes = shapes.extras.get("carry"), objective.carry_axes(module)
    extras = None if carry is None else {"carry": meshes.carry_shardings(mesh, carry, carry_axes)}
    shardings = meshes.state_shardings(mesh, tx, shapes, param_shardings, extras)
    return Setup(
        config=config,
        mesh=mesh,
        model=model,
        objective=objective,
        abstract=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
        ),
        init=jax.jit(init, out_shardings=shardings),
        train_step=make_train_step(
            make_loss(model, objective),
            tx,
            optim,
            config.train.steps,
            seed=config.train.seed,
            shardings=shardings,
            carry_axes=carry_axes,
            trained=trained,
        ),
        eval_step=make_eval_step(model, objective),
    )


def run(
    config: BaseExperiment, workdir: epath.PathLike, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
    """Train to ``config.train.steps``, resuming from the newest checkpoint of ``workdir``, and evaluate.

    Args:
        devices: to make the mesh of; None for all.

    Returns:
        The final metrics by name ("validation/bits_per_byte", ...), with "step"; "stopped" names what ended
        the run early, a signal or the objective's verdict (its state is saved).

    Raises:
        ConfigError, DistributedError, ArchitectureError, CheckpointError, DataError, NonFiniteError: each
            message names the field, file or step. What was saved before stays.
    """
    initialize_distributed(config.distributed)
    workdir, clock = epath.Path(workdir), Clock()
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision(config.train.matmul_precision))
        s = setup(config, devices)
        stack.enter_context(jax.set_mesh(s.mesh))
        progress = stack.enter_context(Progress(config.train.steps))
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
        state, start = restore_or_init(s, checkpoints, workdir, progress)
        writers = open_writers(workdir, wandb_project=config.train.wandb, config=config.to_json())
        stack.callback(writers.close)
        writers.cut(start)
        loop = Loop(s, checkpoints, writers, progress, clock, workdir)
        state, stopped = loop.train(state, start)
        if stopped:
            return {"step": int(state.step), "stopped": stopped}
        results = loop.ended or loop.evaluate(state)
        return finish(s.model, s.objective, config, state.eval_params, results, workdir, progress.note)


def restore_or_init(
    s: Setup, checkpoints: Checkpoints, workdir: epath.Path, progress: Progress
) -> tuple[TrainState, int]:
    """The newest state of the run, or a fresh one; tells what changed in the config since the last start."""
    try:
        s.objective.prepare(workdir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    new, old = s.config.to_json(), run_record.load_config(workdir)
    count = parameter_count(s.model.shapes)
    progress.note(f"{s.config.name}: {count / 1e6:.2f} M parameters on {meshes.describe(s.mesh)}")
    if checkpoints.latest is None:
        state, start = s.init(jax.random.key(s.config.train.seed)), 0
        if s.config.init_from:
            state = start_from(s.config, s.model, state, workdir, progress.note)
    else:
        state, start = checkpoints.restore(s.abstract)
        unread = ", not from init_from" if s.config.init_from else ""
        progress.note(f"resuming {workdir} from step {start}{unread}")
        for change in run_record.explain_config_change(old, new) if old else ():
            progress.note(f"  config changed since the last start: {change}")
    run_record.save_config(workdir, new)
    run_record.save_environment(workdir, start)
    if jax.process_index() == 0:
        table = group_table(s.config.optim, s.model.roles, s.model.axes, s.model.shapes)
        (workdir / "parameters.txt").write_text(format_table(table) + "\n")
    return state, start


class Loop:
    """Steps, evaluations, checkpoints and records of one run."""

    def __init__(
        self,
        s: Setup,
        checkpoints: Checkpoints,
        writers: Writers,
        progress: Progress,
        clock: Clock,
        workdir: epath.Path,
    ):
        self.s, self.checkpoints, self.writers = s, checkpoints, writers
        self.progress, self.clock, self.workdir = progress, clock, workdir
        self.task, self.tokens = s.objective.task, s.objective.tokens_per_step
        self.sharding = meshes.batch_sharding(s.mesh)
        self.flops = s.objective.flops_per_step(s.model.bind(s.model.shapes))
        self.peak = peak_flops(jax.devices()[0])
        self.history: list[dict[str, Any]] = []  # of evaluations
        self.ended: dict[str, Any] = {}  # the last of them, where it ends the run, and why

    def train(self, state: TrainState, start: int) -> tuple[TrainState, str]:
        """The state after the last step, and the signal that ended the run early ("" if none did)."""
        config, batch_size = self.s.config, self.task.config.batch_size
        data = self.task.train(local_rows(self.sharding, batch_size))
        feed = Feed(data, self.sharding, batch_size, start_step=start, end_step=config.train.steps)
        self.history = read_evaluations(self.workdir / "metrics.jsonl", start)
        pending: Mapping[str, jax.Array] | None = None
        compiled = set[Any]()  # shapes of batches
        with feed, Preemption() as preemption:
            for step in range(start, config.train.steps):
                with self.clock.measure("data"):
                    _, batch = next(feed)
                self._profile(step)
                shape = tuple(array.shape for array in batch.values())
                with self.clock.measure("step" if shape in compiled else "compile"):
                    state, metrics = self.s.train_step(state, batch)
                    if pending is not None:  # the step just dispatched runs on meanwhile
                        self._settle(step, pending)
                    elif step == start:
                        jax.block_until_ready(metrics)
                done, pending = step + 1, metrics
                compiled.add(shape)
                evaluate = config.train.eval_every and done % config.train.eval_every == 0
                save = config.checkpoint.every and done % config.checkpoint.every == 0
                stop = preemption.should_stop(done)
                if evaluate or save or stop or done == config.train.steps:
                    self._settle(done, pending)  # never save or evaluate a state not known to be finite
                    pending = None
                if evaluate and done < config.train.steps:
                    state = self._plateau(state, self.evaluate(state))
                    self._judge()
                if save or stop or self.ended or done == config.train.steps:
                    with self.clock.measure("checkpoint"):
                        self.checkpoints.save(done, state, wait=stop)
                if stop:
                    self.progress.note(f"{preemption.reason}: saved step {done} in {self.workdir}, stopping")
                    return state, preemption.reason
                if self.ended:
                    self.progress.note(
                        f"{self.ended['stopped']}: saved step {done} in {self.workdir}, stopping"
                    )
                    break
        return state, ""

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Metrics of every held-out set, recorded and shown."""
        with self.clock.measure("eval"):
            results = evaluate(self.s.eval_step, state.eval_params, self.task, self.sharding, state.carry)
        step = int(state.step)
        self.writers.write(step, results)
        self.history.append({"step": step, **results})
        shown = "  ".join(f"{metric} {value:.4f}" for metric, value in results.items())
        self.progress.note(f"step {step}  {shown}")
        return self.history[-1]

    def _judge(self) -> None:
        """Say what the objective makes of the evaluations; it may end the run."""
        note, why = self.s.objective.verdict(self.history)
        if note:
            self.progress.note(note)
        if why:
            self.ended = {**self.history[-1], "stopped": why}

    def _settle(self, done: int, metrics: Mapping[str, jax.Array]) -> None:
        """Fetch the metrics of update ``done``: refuse non-finite ones, record and show the rest."""
        values = {name: np.asarray(value).item() for name, value in jax.device_get(dict(metrics)).items()}
        self.clock.count(self.tokens)
        config = self.s.config.train
        if not values.pop("finite") and config.nonfinite == "stop":
            raise self._nonfinite(done - 1, values)
        parameter = values.pop("nonfinite_parameter")
        if parameter >= 0:
            path = parameter_paths(self.s.model.shapes)[parameter]
            self.progress.note(f"step {done - 1}: left out, the gradient of {path} is not finite")
        rate = self.clock.tokens_per_second()
        speed = {
            "tokens_per_second": rate,
            "mfu": mfu(rate and rate / self.tokens * self.flops, self.s.mesh.size, self.peak),
        }
        shown = {"loss": values["loss"], "bpb": values.get("bits_per_byte"), **speed}
        self.progress.update(done, shown | {"eta": self.clock.eta(config.steps - done)})
        if done % config.log_every == 0 or done == config.steps:
            record = {f"train/{name}": value for name, value in values.items()}
            record |= {f"speed/{name}": value for name, value in speed.items() if value is not None}
            record |= {f"seconds/{name}": round(value, 3) for name, value in self.clock.seconds().items()}
            self.writers.write(done, record)

    def _nonfinite(self, step: int, values: Mapping[str, Any]) -> NonFiniteError:
        self.checkpoints.wait()
        index, paths = values["nonfinite_parameter"], parameter_paths(self.s.model.shapes)
        return NonFiniteError(
            f"step {step}: loss {values['loss']}; first parameter with a non-finite gradient: "
            f"{paths[index] if index >= 0 else 'none'}; the last good checkpoint is step "
            f"{self.checkpoints.latest or 'none'} in {self.workdir}. Lower optim.lr, "
            "set optim.clip_norm, or leave such updates out with train.nonfinite='skip'"
        )

    def _plateau(self, state: TrainState, results: Mapping[str, float]) -> TrainState:
        if "plateau" not in state.extras:
            return state
        plateau = self.s.config.optim.schedule.plateau
        watched = results["validation/loss" if plateau.mode == "min" else "validation/accuracy"]
        controller = update_plateau(state.extras["plateau"], watched, plateau)
        controller = jax.device_put(controller, self.s.abstract.step.sharding)
        return dataclasses.replace(state, extras={**state.extras, "plateau": controller})

    def _profile(self, step: int) -> None:
        first, count = self.s.config.train.profile_at, self.s.config.train.profile_steps
        if count and step == first:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        if count and step == first + count:
            jax.profiler.stop_trace()


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; settings are --config.FIELD=VALUE")
    for name in ("absl", "jax"):  # orbax tells every write, jax every backend it does not find
        logging.getLogger(name).setLevel(logging.WARNING)
    expected = (ConfigError, DistributedError, ArchitectureError, CheckpointError, DataError, NonFiniteError)
    with leaving_at_once(CONFIG.value.distributed):
        try:
            run(CONFIG.value, WORKDIR.value)
        except expected as error:
            sys.exit(f"{type(error).__name__}: {error}")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with unknown config fields explained."""
    try:
        overrides.check(argv)
        return flags.FLAGS(argv)
    except (ValueError, FileNotFoundError, flags.Error) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    restart_with_tuned_malloc()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)

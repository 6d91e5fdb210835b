"""Checkpoints of a run: saved in the background, atomic, restored onto any mesh, proof against a bad newest.

A checkpoint is one pytree of arrays under ``WORKDIR/checkpoints/STEP``, where STEP counts completed updates.
Paths may be local or ``gs://``. In a run of several processes every process calls every method, in the same
order.
"""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import contextlib
import dataclasses
import logging
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from runtime.restore import ArchitectureError, brief, placed, try_restore

PyTree = Any  # of jax.Array, or of jax.ShapeDtypeStruct with shardings where "abstract"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a directory that orbax is still writing
ASIDE = ".aside"  # suffix of a checkpoint that the run did not continue from

__all__ = ["ArchitectureError", "CheckpointConfig", "CheckpointError", "Checkpoints", "save_alone"]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; those before it are untouched."""


@dataclasses.dataclass
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
        every: steps between saves; 0 saves only when asked to.
        keep_last: how many of the newest checkpoints to keep, at least 1; there is one more while saving.
        keep_every: also keep every checkpoint whose step is a multiple of this; 0 for none.
        async_: write in the background; False waits for each save.
    """

    every: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    async_: bool = True

    def validate(self) -> None:
        """Raises ValueError naming the field that makes no sense."""
        for name, least in (("every", 0), ("keep_last", 1), ("keep_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}, but must be at least {least}")


class Checkpoints:
    """The checkpoints of one workdir. Reading changes nothing on disk; use it as a context or ``close`` it.

    A failed save surfaces as :class:`CheckpointError` from the next ``save``, ``maybe_save``, ``wait`` or
    ``close``; once raised it is forgotten, so that the caller may go on.
    """

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig | None = None):
        self.config = config or CheckpointConfig()
        self.config.validate()
        directory = epath.Path(workdir) / "checkpoints"
        self.directory = directory if "://" in str(workdir) else epath.Path(directory.absolute())
        self._writer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._at: int | None = None  # the checkpoint this run continues from: last restored or saved

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending (whether they can be read is not checked)."""
        if not self.directory.exists():
            return []
        names = (p.name for p in self.directory.iterdir())
        steps = sorted(int(name) for name in names if name.isdecimal())
        return [s for s in steps if ocp.path.step.is_path_finalized(self.path(s))]

    @property
    def latest(self) -> int | None:
        """Step of the newest finished checkpoint, or None; the same on every process."""
        steps = _steps_of_process_0(self.steps())
        return steps[-1] if steps else None

    def path(self, step: int) -> epath.Path:
        """Directory of the checkpoint of ``step``."""
        return self.directory / str(step)

    def maybe_save(self, step: int, state: PyTree) -> bool:
        """Saves if ``step`` is a multiple of ``config.every``; see :meth:`save`. Never waits otherwise."""
        if self._pending is not None and self._pending[1].done():
            self.wait()
        if self.config.every == 0 or step % self.config.every:
            return False
        return self.save(step, state)

    def save(self, step: int, state: PyTree, wait: bool = False) -> bool:
        """Saves ``state`` as the checkpoint of ``step``; False if the run already stands there.

        The arrays are copied before this returns, so the caller may donate them; files are written in the
        background and appear under their final name only when complete. Checkpoints newer than the one this
        run continued from (unreadable ones, or an abandoned branch) are renamed ``STEP.aside``, not deleted.

        Raises:
            CheckpointError: this save (if it waits) or the one before failed, for example on a full disk.
            ValueError: ``step`` lies before the checkpoint this run stands at.
        """
        self.wait()
        if step == self._at:
            return False
        if self._at is not None and step < self._at:
            raise ValueError(f"cannot save step {step}: this run already stands at checkpoint {self._at}")
        try:
            if jax.process_index() == 0:
                self._clear_the_way()
            self._writer.save(self.path(step), args=ocp.args.PyTreeSave(state))
        except Exception as error:
            raise self._save_error(step, error) from error
        self._pending = (step, self._background.submit(self._finish, step))
        if wait or not self.config.async_:
            self.wait()
        return True

    def wait(self) -> None:
        """Waits for the save in progress, if any. Raises CheckpointError if it failed."""
        if self._pending is None:
            return
        step, saving = self._pending
        self._pending = None
        try:
            saving.result()
        except Exception as error:
            raise self._save_error(step, error) from error
        self._at = step

    def close(self) -> None:
        """Waits for the save in progress and ends the background threads. Raises as :meth:`wait` does."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._writer.close()

    def _finish(self, step: int) -> None:
        """In the background: once the checkpoint of ``step`` is complete, delete those no longer kept."""
        self._writer.wait_until_finished()
        if jax.process_index():
            return
        steps = [s for s in self.steps() if s <= step]
        keep = set(steps[-self.config.keep_last :])
        for old in steps:
            if old not in keep and not (self.config.keep_every and old % self.config.keep_every == 0):
                try:
                    self.path(old).rmtree()
                except OSError as error:
                    logging.warning("could not delete the old checkpoint %s: %s", self.path(old), error)

    def _clear_the_way(self) -> None:
        """Removes what a killed save left; renames the checkpoints that this run did not continue from."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        for step in self.steps():
            if self._at is None or step > self._at:
                target, n = self.directory / f"{step}{ASIDE}", 0
                while target.exists():
                    n += 1
                    target = self.directory / f"{step}{ASIDE}.{n}"
                self.path(step).rename(target)
                warnings.warn(
                    f"checkpoint {self.path(step)} is newer than step {self._at}, which this run continued "
                    f"from; it is kept as {target.name}",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _remove_unfinished(self) -> None:
        for path in self.directory.iterdir():
            unfinished = path.name.isdecimal() and not ocp.path.step.is_path_finalized(path)
            if unfinished or UNFINISHED in path.name:
                path.rmtree()

    def _save_error(self, step: int, cause: Exception) -> CheckpointError:
        """Describes a failed save, and removes its half-written files: they may be what fills the disk."""
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(self.directory).free / 1e9:.3f} GB"
            if jax.process_index() == 0:
                self._remove_unfinished()
        full = "the disk is full: " if "No space left on device" in str(cause) else ""
        return CheckpointError(
            f"the checkpoint of step {step} was not saved to {self.path(step)}: {full}{brief(cause)}. "
            f"Free space when it failed: {free}. Earlier checkpoints are intact: {self.steps()}. Make "
            "room (a lower checkpoint.keep_last keeps fewer), or use another workdir"
        )

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, int]:
        """The newest readable checkpoint (or that of ``step``), sharded as asked; and its step.

        Args:
            abstract_state: the pytree saved, with a ``jax.ShapeDtypeStruct`` that has the target sharding in
                place of each array. Mesh and process count may differ from those of the saving run.
            step: a particular checkpoint, without falling back to an older one.

        Raises:
            FileNotFoundError: there is no checkpoint (of ``step``).
            ArchitectureError: the checkpoint holds other leaves, shapes or dtypes; lists the first ones. Of
                type ValueError.
            CheckpointError: no checkpoint could be read. One that is corrupt or incomplete is left as it is
                and skipped with a warning, as long as an older one can be read.
        """
        state, self._at = self._load(abstract_state, step, partial=False)
        return state, self._at

    def restore_part(self, abstract: dict[str, PyTree], step: int | None = None) -> tuple[dict, int]:
        """Some fields of the saved state only, such as ``{"params": abstract_params}``; and the step.

        Floating point leaves are cast to the dtype asked for. Raises as :meth:`restore` does.
        """
        return self._load(abstract, step, partial=True)

    def restore_params(self, abstract_params: PyTree, step: int | None = None) -> PyTree:
        """The parameters alone, for evaluation. Raises as :meth:`restore` does."""
        return self.restore_part({"params": abstract_params}, step)[0]["params"]

    def _load(self, abstract: PyTree, step: int | None, partial: bool) -> tuple[PyTree, int]:
        self.wait()
        steps = _steps_of_process_0(self.steps())
        if not steps or (step is not None and step not in steps):
            which = "" if step is None else f" of step {step}"
            raise FileNotFoundError(f"no checkpoint{which} in {self.directory}; there are steps {steps}")
        target = placed(abstract)
        failures: list[str] = []
        for candidate in [step] if step is not None else reversed(steps):
            loaded, failure = try_restore(self.path(candidate), target, partial)
            if _on_all_processes(not failure):
                return loaded, candidate
            failure = failure or "another process could not read it"
            failures.append(f"step {candidate} at {self.path(candidate)}: {failure}")
            if step is None and candidate != steps[0]:
                warnings.warn(
                    f"checkpoint cannot be read, trying the one before: {failures[-1]}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        advice = f"other steps: {[s for s in steps if s != step]}" if step is not None else "all were tried"
        listed = "\n  ".join(failures)
        raise CheckpointError(
            f"no checkpoint in {self.directory} could be read ({advice}):\n  {listed}\n"
            "Nothing was deleted. Repair one, or start afresh in another workdir"
        )


def save_alone(workdir: epath.PathLike, step: int, state: PyTree) -> None:
    """Writes the one checkpoint of a new run, copying no more than a few shards of its arrays at a time.

    For states as large as the memory; ``Checkpoints.save`` copies all of them at once, to return early.

    Raises:
        CheckpointError: it could not be written, for example to a full disk.
    """
    with Checkpoints(workdir) as checkpoints:
        path = checkpoints.path(step)
    shards = (leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    in_flight = max(2 * max(shards, default=0) / 1e9, 0.25)  # orbax refuses a shard above its limit
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=in_flight)  # type: ignore[arg-type]
    try:
        with ocp.Checkpointer(handler) as writer:
            writer.save(path, args=ocp.args.PyTreeSave(state))
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise CheckpointError(f"the checkpoint {path} was not written: {brief(error)}") from error


def _steps_of_process_0(steps: list[int]) -> list[int]:
    """Every process acts on the listing of process 0; a shared file system may show others a stale one."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.resize(np.array(steps or [0], np.int32), count)
    return [int(s) for s in np.atleast_1d(multihost_utils.broadcast_one_to_all(padded))] if count else []


def _on_all_processes(ok: bool) -> bool:
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))

"""Where metrics go: one JSONL file, TensorBoard, optionally wandb; on process 0 only.

``step`` counts completed updates, as in checkpoints. After resuming from the checkpoint of step s, ``cut(s)``
takes back what an earlier attempt wrote for later steps.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath

REWRITE_EVERY = 30.0  # seconds between rewrites of a log on a store that cannot append


@runtime_checkable
class Writer(Protocol):
    """Takes records of named scalars."""

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records ``values`` (numbers, strings, 0-d arrays) for ``step``."""

    def cut(self, step: int) -> None:
        """Takes back the records of steps after ``step``."""

    def close(self) -> None:
        """Finishes writing."""


def open_writers(workdir: epath.PathLike, *, wandb_project: str = "", config: str | None = None) -> Writers:
    """The writers of a run: ``metrics.jsonl`` and ``tensorboard/`` in its workdir, and wandb if asked for.

    Args:
        wandb_project: name of a project, or "" for none.
        config: JSON text of the config, for wandb to show.
    """
    if jax.process_index():
        return Writers([])
    writers: list[Writer] = [
        JsonlWriter(epath.Path(workdir) / "metrics.jsonl"),
        TensorBoardWriter(epath.Path(workdir) / "tensorboard"),
    ]
    if wandb_project:
        writers.append(WandbWriter(workdir, wandb_project, config))
    return Writers(writers)


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = list(writers)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records ``values`` for ``step`` everywhere."""
        plain = {name: to_plain(value) for name, value in values.items()}
        for writer in self.writers:
            writer.write(step, plain)

    def cut(self, step: int) -> None:
        """Takes back the records of steps after ``step``."""
        for writer in self.writers:
            writer.cut(step)

    def close(self) -> None:
        """Finishes writing."""
        for writer in self.writers:
            writer.close()


def to_plain(value: Any) -> Any:
    """0-d jax and numpy arrays as python scalars, others as lists; mappings and sequences throughout."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        array = np.asarray(value)
        # bfloat16 and the like are numpy dtypes of kind V, which tolist() would leave as they are.
        return array.astype(np.float32).tolist() if array.dtype.kind == "V" else array.tolist()
    return value


def to_json(value: Any) -> Any:
    """As :func:`to_plain`, with non-finite floats as "nan", "inf", "-inf": JSON has no numbers for them."""
    value = to_plain(value)
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class JsonlWriter:
    """One line a record: ``{"step": 20, "time": 1760000000.0, "loss": 2.5, ...}``; flushed at once.

    Where files cannot grow, the whole file is rewritten instead, at most every 30 seconds.
    """

    def __init__(self, path: epath.PathLike, *, append: bool | None = None):
        """
        Args:
            path: local or ``gs://``.
            append: whether the file can grow; None: unless it is remote.
        """
        self.path = epath.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append = "://" not in str(path) if append is None else append
        self._flushed = time.monotonic()
        self._file: Any = None
        self._open()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a record; ``time`` is in seconds since 1970."""
        record = {"step": int(step), "time": round(time.time(), 3), **to_json(values)}
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._append:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._flushed > REWRITE_EVERY:
                self._rewrite()

    def cut(self, step: int) -> None:
        """Moves records after ``step``, and a line that a kill left half-written, to metrics.cutN.jsonl."""
        self.close()
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
        if len(kept) < len(lines):
            dropped = [line for line in lines if (at := _step_of(line)) is None or at > step]
            n = 1
            while (backup := self.path.parent / f"{self.path.stem}.cut{n}{self.path.suffix}").exists():
                n += 1
            backup.write_text("".join(dropped))
            # In this order a crash in between loses nothing.
            temporary = self.path.parent / f"{self.path.name}.tmp"
            temporary.write_text("".join(kept))
            temporary.replace(self.path)
        self._open()

    def close(self) -> None:
        """Writes what is still held back."""
        if self._append:
            self._file.close()
        else:
            self._rewrite()

    def _open(self) -> None:
        if self._append:
            self._file = self.path.open("a")
        else:
            text = self.path.read_text() if self.path.exists() else ""
            self._lines = text.splitlines(keepends=True)

    def _rewrite(self) -> None:
        self.path.write_text("".join(self._lines))
        self._flushed = time.monotonic()


def _step_of(line: str) -> int | None:
    """Step of a complete record, or None."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class TensorBoardWriter:
    """Event files for TensorBoard; only numbers are written."""

    def __init__(self, logdir: epath.PathLike):
        self._logdir = str(logdir)
        self._writer: Any = None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a scalar a name."""
        writer = self._open()
        for name, value in values.items():
            value = to_plain(value)
            if isinstance(value, (int, float)):
                writer.add_scalar(name, float(value), int(step))
        writer.flush()

    def cut(self, step: int) -> None:
        """Starts a file that tells TensorBoard to disregard earlier files after ``step``."""
        self.close()
        self._open(purge_step=step + 1)

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self, **options: Any) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter  # half a second that a run without metrics need not pay

            logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # else a warning for every NaN
            # File names count seconds; a second file within one would overwrite the first.
            self._writer = SummaryWriter(self._logdir, filename_suffix=f".{time.time_ns()}", **options)
        return self._writer


class WandbWriter:
    """Logs to a wandb project; a resumed run continues the same wandb run, kept in ``WORKDIR/wandb_id.txt``.

    wandb cannot take records back. They carry ``step`` as their axis, so that a repeated stretch is drawn
    over the earlier one.
    """

    def __init__(self, workdir: epath.PathLike, project: str, config: str | None = None):
        import wandb

        path = epath.Path(workdir) / "wandb_id.txt"
        name = path.read_text().strip() if path.exists() else None
        settings = json.loads(config) if config else None
        self._run = wandb.init(project=project, id=name, resume="allow", config=settings)
        path.write_text(self._run.id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs one record."""
        self._run.log({"step": int(step), **{name: to_plain(value) for name, value in values.items()}})

    def cut(self, step: int) -> None:
        """Leaves the records: see the class."""

    def close(self) -> None:
        """Ends the wandb run."""
        self._run.finish()

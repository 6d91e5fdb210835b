"""A run of several processes: joining it, and leaving it so that the others learn of it at once."""

# No ``from __future__ import annotations`` here: command-line overrides read the field types at run time.
import contextlib
import dataclasses
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from runtime.rendezvous import DistributedError, meet
from runtime.stderr_pipe import RESUME, drain_stderr, pipe_stderr

__all__ = ["DistributedConfig", "DistributedError", "initialize_distributed", "leaving_at_once"]

# How the loss of a process shows in those that wait for it: in collectives, in barriers of checkpoints.
LOST = re.compile(
    r"gloo|nccl|barrier|coordination|heartbeat|connection (closed|reset)|socket closed", re.IGNORECASE
)
MARGIN = 5.0  # seconds that a lost process may take to be named after its heartbeat timed out


@dataclasses.dataclass
class DistributedConfig:
    """How the processes of a run find each other; the defaults mean a single process.

    Attributes:
        auto: let jax find the cluster (TPU pods, SLURM, Open MPI, Kubernetes).
        coordinator: otherwise "host:port" of process 0,
        num_processes, process_id: and who this is.
        connect_timeout: seconds to wait for the other processes at the start.
        heartbeat_timeout: seconds of silence after which a process counts as lost, and the others stop.
        shutdown_timeout: seconds that a finished process waits for the others.
    """

    auto: bool = False
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    connect_timeout: int = 300
    heartbeat_timeout: int = 60
    shutdown_timeout: int = 300

    def validate(self) -> None:
        """Raises DistributedError naming the fields that make no sense."""
        for name, least in (("connect_timeout", 1), ("heartbeat_timeout", 4), ("shutdown_timeout", 1)):
            if getattr(self, name) < least:
                raise DistributedError(
                    f"distributed.{name}={getattr(self, name)}: expected {least} s or more"
                )
        if not self.auto and (not self.coordinator or not 0 <= self.process_id < self.num_processes):
            raise DistributedError(
                f"distributed.coordinator={self.coordinator!r}, num_processes={self.num_processes}, "
                f"process_id={self.process_id}: expected 'host:port' and 0 <= process_id < num_processes, or "
                "distributed.auto=True on a cluster that jax recognises."
            )


def initialize_distributed(config: DistributedConfig) -> None:
    """Join the run's processes; call it before anything touches a device. A second call does nothing.

    From then on stderr carries the process number, except that of process 0 (``runtime.stderr_pipe``).

    Raises:
        DistributedError: the fields do not say who this process is, or the processes do not find together.
    """
    if jax.distributed.is_initialized() or not (config.auto or config.coordinator or config.num_processes):
        return
    config.validate()
    # XLA has no collectives between CPU processes of its own; accelerators ignore this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timeouts: dict[str, Any] = {
        "initialization_timeout": config.connect_timeout,
        "heartbeat_timeout_seconds": config.heartbeat_timeout,
        "shutdown_timeout_seconds": config.shutdown_timeout,
    }
    if config.auto:
        try:
            jax.distributed.initialize(**timeouts)
        except (ValueError, TypeError) as error:
            raise DistributedError(
                f"distributed.auto=True, but jax finds no cluster around this process ({error}). It knows "
                "TPU pods, SLURM's srun, Open MPI and Kubernetes; elsewhere set "
                "distributed.coordinator='host:port', num_processes and process_id"
            ) from error
        pipe_stderr(jax.process_index(), jax.process_count(), "")
        return
    meet(config.coordinator, config.num_processes, config.process_id, config.connect_timeout)
    pipe_stderr(config.process_id, config.num_processes, config.coordinator)
    jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id, **timeouts)


@contextlib.contextmanager
def leaving_at_once(config: DistributedConfig) -> Iterator[None]:
    """Around a program: of several processes, one with an error ends without waiting for the others.

    At python's normal exit jax would wait for processes that wait for this one. Where the error is that
    another process was lost, it stays until the coordinator has named that one: about ``heartbeat_timeout``.
    With a single process nothing is changed.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or (isinstance(error, SystemExit) and not error.code):
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exc()
        if LOST.search(str(error)):
            wait = config.heartbeat_timeout + MARGIN
            print(f"Another process was lost, it seems; it is named within {wait:g} s.", file=sys.stderr)
            time.sleep(wait)  # the coordinator ends this process meanwhile
            print(f"LostProcess: none was named; see what the others tell. {RESUME}", file=sys.stderr)
        sys.stdout.flush()
        drain_stderr()
        os._exit(1)

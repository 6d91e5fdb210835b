"""A job as a process that holds a lock for as long as it lives, whatever becomes of what has started it.

Workers of a cluster import this: it needs nothing but the standard library.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

GRACE = 120.0  # seconds that jobs have to save and leave


@dataclasses.dataclass(frozen=True)
class Task:
    """A job for an executor: arguments of a python.

    Attributes:
        log: what the job says is appended to it; its lock lies beside it.
    """

    name: str
    argv: tuple[str, ...]
    log: Path

    @property
    def lock(self) -> Path:
        """What the job's process holds."""
        return self.log.with_suffix(".lock")


def spawn(task: Task, environment: Mapping[str, str], cwd: str | None = None) -> subprocess.Popen[bytes]:
    """The process of a task, at the head of a group of its own; it holds the task's lock.

    Raises:
        BlockingIOError: another process holds it.
    """
    lock = hold(task.lock)
    if lock is None:
        raise BlockingIOError(f"{task.lock} is held: {task.name} runs already")
    with lock, task.log.open("ab") as log:
        log.write(f"$ {shlex.join(['python', *task.argv])}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *task.argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
            env=environment,
            cwd=cwd,
        )
        note_holder(lock, process.pid)
    return process


def hold(path: Path) -> IO[str] | None:
    """The open file that holds the lock ``path`` until it and its copies in other processes are closed.

    None if another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def held(path: Path) -> bool:
    """Whether a process holds the lock."""
    if not path.exists():
        return False
    file = hold(path)
    if file is None:
        return True
    file.close()
    return False


def note_holder(file: IO[str], pid: int) -> None:
    """Writes into a lock which process of this machine holds it."""
    file.truncate(0)
    file.write(f"{socket.gethostname()} {pid}\n")
    file.flush()


def signal_holder(path: Path, number: signal.Signals) -> None:
    """Sends a signal to the process that holds a lock, if it is one of this machine."""
    host, _, pid = path.read_text().strip().partition(" ")
    if held(path) and host == socket.gethostname() and pid.isdecimal():
        try:
            os.kill(int(pid), number)
        except ProcessLookupError:  # it has just left
            return


def wait_for(locks: Collection[Path], seconds: float = GRACE) -> None:
    """Until no process holds any of the locks, or the time is over."""
    deadline = time.monotonic() + seconds
    while any(held(lock) for lock in locks) and time.monotonic() < deadline:
        time.sleep(0.1)

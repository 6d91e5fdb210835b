"""The stderr of one of several processes: lines carry the process number, and jax's abort is put into words.

When a process of a run is lost, jax's coordination service aborts all others, from C++: nothing in python can
say what happened. So stderr goes through this file, run as a small program that outlives the abort.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from io import BufferedIOBase

FATAL = b"JAX distributed service detected fatal errors"
STACK = b"*** Check failure stack trace"
DRAIN = 2.0  # seconds to let the last lines through at exit
RESUME = "Start the run again, on as many processes as there are: it resumes from its newest checkpoint."


def pipe_stderr(process_id: int, num_processes: int, coordinator: str) -> None:
    """From here on stderr, of python and C++ alike, passes through this file.

    Args:
        coordinator: "host:port" of process 0, or "" where jax chose it.
    """
    reader, writer = os.pipe()
    command = [sys.executable, "-I", "-S", __file__, str(process_id), str(num_processes), coordinator]
    # A session of its own: Ctrl-C must not end it before the process it speaks for.
    program = subprocess.Popen(command, stdin=reader, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(reader)
    sys.stderr.flush()
    os.dup2(writer, 2)
    os.close(writer)
    global _program
    _program = program


_program: subprocess.Popen | None = None


def drain_stderr() -> None:
    """Closes stderr and waits until its last line is written; for a process that ends itself at once."""
    if _program is None:
        return
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _program.wait(DRAIN)


def explain(text: str, num_processes: int, coordinator: str) -> str:
    """What jax's last words mean.

    Args:
        text: of the abort, from "Terminating process because" on.
    """
    at = f" at {coordinator}" if coordinator else ""
    lost = re.search(r"stopped sending heartbeats\):\s*((?:\d+\s+)+)", text)
    ids = lost.group(1).split() if lost else re.findall(r"Task (\d+) heartbeat timeout", text)
    if ids:
        numbers = sorted(set(ids), key=int)
        who = f"process{'es' if len(numbers) > 1 else ''} {', '.join(numbers)}"
        what = f"{who} of {num_processes} died, or hangs, or lost the connection (no heartbeat)"
    elif "Failed to send RPC to coordination service" in text:
        what = f"process 0 of {num_processes}, the coordinator{at}, died or cannot be reached"
    elif "RegisterTask" in text:
        what = f"not all of the {num_processes} processes could connect to the coordinator{at} in time"
    elif "arrier" in text:
        what = f"the {num_processes} processes did not all reach a barrier in time; one failed or hangs"
    else:
        what = " ".join(text.split())
    return f"LostProcess: {what}. Its log, or the scheduler's, tells why. This process stops too. {RESUME}"


def relay(
    source: BufferedIOBase, out: BufferedIOBase, process_id: int, num_processes: int, coordinator: str
) -> None:
    """Copies ``source`` to ``out`` until it ends, a line at a time.

    Lines of process 0 stay as they are, others begin with "[process N] ". From jax's abort on, one line of
    words takes the place of the message and the stack.
    """
    label = f"[process {process_id}] ".encode() if process_id else b""
    held: list[bytes] | None = None

    def write(line: bytes) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone must not block the process
            out.write(label + line)
            out.flush()

    def explained(lines: list[bytes]) -> bytes:
        text = b"".join(lines).decode(errors="replace")
        return explain(text[text.find("Terminating") :], num_processes, coordinator).encode() + b"\n"

    for line in iter(source.readline, b""):
        if held is None and FATAL in line:
            held = [line]
        elif held and line.startswith(STACK):
            write(explained(held))
            held = []  # the stack: nothing more is shown
        elif held is None:
            write(line)
        elif held:
            held.append(line)
    if held:
        write(explained(held))


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    process_id, num_processes, coordinator = sys.argv[1:]
    with open(0, "rb") as source, open(2, "wb", closefd=False) as out:
        relay(source, out, int(process_id), int(num_processes), coordinator)


if __name__ == "__main__":
    main()

"""Before jax connects the processes of a run: do all come to the coordinator, and each of them once?

jax's coordination service ends in a segmentation fault where its port is in use, and in an abort after a
timeout where a process is missing or comes twice. Here process 0 first takes the roll at the same address, by
plain sockets, and tells every process what is wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import socket
import time

GREETING_TIMEOUT = 5.0  # seconds within which a caller says who it is, and process 0 says so to all
RETRY = 0.2  # seconds between attempts to reach process 0
LONGEST_LINE = 65536  # bytes


class DistributedError(ValueError):
    """The processes of a run do not find together; the message names the field and what would work."""


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who a process says it is."""

    process_id: int
    num_processes: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.process_id} (pid {self.pid} on {self.host})"


def meet(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns once all processes 0, ..., ``num_processes - 1`` have called; every one of them calls it.

    Args:
        coordinator: "host:port" of process 0, free for others again when this returns.
        timeout: seconds to wait for process 0, and for it to wait for the others.

    Raises:
        DistributedError: the port is in use, nobody listens there, processes are missing, two have the same
            number or another ``num_processes``. Every process that came is told, not only the one at fault.
    """
    host, port = parse_address(coordinator)
    me = Caller(process_id, num_processes, socket.gethostname(), os.getpid())
    if process_id == 0:
        _call_the_roll(coordinator, port, me, timeout)
    else:
        _report(coordinator, host, port, me, timeout)


def parse_address(coordinator: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port". Raises DistributedError."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise DistributedError(
            f"distributed.coordinator={coordinator!r} is not 'host:port' with a port from 1 to 65535; it is "
            "the address of process 0 as the others reach it, such as '10.0.0.2:8476'"
        )
    return host.strip("[]"), int(port)


def _call_the_roll(coordinator: str, port: int, me: Caller, timeout: float) -> None:
    """Process 0: waits for the others and answers all of them, with the same problem or none."""
    deadline = time.monotonic() + timeout
    present, problem = {0: me}, ""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(coordinator, port))
        connections = []
        while len(present) < me.num_processes and not problem:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                problem = _missing(coordinator, present, me.num_processes, timeout)
                break
            caller = _greeting(connection)
            if caller is None:  # a port scanner, a health check
                continue
            connections.append(connection)
            problem = _objection(caller, present, me.num_processes)
            present.setdefault(caller.process_id, caller)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    if problem:
        raise DistributedError(problem)


def _listen(coordinator: str, port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            address = ("", port)
            return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        raise DistributedError(
            f"distributed.coordinator={coordinator!r}: process 0 cannot listen on port {port} of "
            f"{socket.gethostname()}: {'it is in use' if in_use else error.strerror}. Is an earlier process "
            "of this run, or another run, still there? End it, or give all processes another port"
        ) from error


def _greeting(connection: socket.socket) -> Caller | None:
    """Who calls, or None where it is no process of a run."""
    try:
        return Caller(**json.loads(_line(connection, GREETING_TIMEOUT)))
    except (OSError, ValueError, TypeError):
        return None


def _objection(caller: Caller, present: dict[int, Caller], num_processes: int) -> str:
    """What is wrong with a caller, "" for nothing."""
    if caller.num_processes != num_processes:
        return (
            f"{caller} was started with distributed.num_processes={caller.num_processes}, {present[0]} with "
            f"{num_processes}; give all processes the same"
        )
    if caller.process_id in present:
        return (
            f"distributed.process_id={caller.process_id} was given twice, to {present[caller.process_id]} "
            f"and to {caller}; the {num_processes} processes need the numbers 0 to {num_processes - 1}"
        )
    return ""


def _missing(coordinator: str, present: dict[int, Caller], num_processes: int, timeout: float) -> str:
    absent = [str(i) for i in range(num_processes) if i not in present]
    shown = ", ".join(absent[:8]) + (", ..." if len(absent) > 8 else "")
    return (
        f"{len(absent)} of {num_processes} processes did not come to {coordinator} within {timeout:g} s: "
        f"distributed.process_id {shown}. Were they started, can their hosts reach this address, and is it "
        "that of process 0? distributed.connect_timeout is how long to wait"
    )


def _report(coordinator: str, host: str, port: int, me: Caller, timeout: float) -> None:
    """Any other process: tells process 0 that it is there, and waits until all are."""
    with _reach(coordinator, host, port, me, timeout) as connection:
        try:
            connection.sendall(json.dumps(dataclasses.asdict(me)).encode() + b"\n")
            problem = json.loads(_line(connection, timeout + GREETING_TIMEOUT))["problem"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DistributedError(
                f"distributed.coordinator={coordinator!r}: something listens there, but it is no process 0 "
                f"that waits for {me}. Either the run is under way already, with another process "
                f"{me.process_id} of {me.num_processes}, or process 0 was ended, or the port belongs to "
                "another program; look there, or give all processes another port"
            ) from error
    if problem:
        raise DistributedError(problem)


def _reach(coordinator: str, host: str, port: int, me: Caller, timeout: float) -> socket.socket:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, port), timeout=GREETING_TIMEOUT)
        except OSError as error:  # names may not resolve, and process 0 not listen, until its host is up
            if time.monotonic() + RETRY > deadline:
                raise DistributedError(
                    f"distributed.coordinator={coordinator!r}: {me} reached nobody there within {timeout:g} "
                    f"s ({error.strerror or error}). Process 0 must run on that host, be started at about "
                    "the same time, and be reachable through any firewall; distributed.connect_timeout is "
                    "how long to wait"
                ) from error
            time.sleep(RETRY)


def _line(connection: socket.socket, timeout: float) -> bytes:
    """Raises OSError on a timeout, ValueError if the other side closes or sends no line."""
    connection.settimeout(timeout)
    with connection.makefile("rb") as file:
        line = file.readline(LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise ValueError(f"no line but {line[:40]!r}")
    return line

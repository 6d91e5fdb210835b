"""Several processes: finding together, each bad start told in words, and what is said when one is lost."""

import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from runtime import stderr_pipe
from runtime.processes import DistributedConfig, DistributedError, initialize_distributed, leaving_at_once
from runtime.rendezvous import meet, parse_address

ROOT = pathlib.Path(__file__).resolve().parents[2]
FATAL = (
    "F1122 20:41:47.279442 4077 client.h:80] Terminating process because the JAX distributed service "
    "detected fatal errors. This most likely indicates that another task died; see the logs. absl::Status: "
)
HEARTBEAT = f"""{FATAL}UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
3
1
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further.

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7f2259040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
    @     0x7f22590405b6  absl::lts_20260107::log_internal::LogMessage::Flush()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def call(processes, timeout=5.0, port=None):
    """What each of ``(process_id, num_processes)`` is told: "" or the error, in order."""
    coordinator = f"127.0.0.1:{port or free_port()}"
    told = [""] * len(processes)

    def one(i):
        process_id, num_processes = processes[i]
        try:
            meet(coordinator, num_processes, process_id, timeout)
        except DistributedError as error:
            told[i] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return told, coordinator


def test_all_come_and_the_port_is_free_again():
    told, coordinator = call([(2, 4), (0, 4), (3, 4), (1, 4)])
    assert told == ["", "", "", ""]
    assert call([(0, 2), (1, 2)], port=int(coordinator.rpartition(":")[2]))[0] == ["", ""]


def test_a_number_given_twice_is_told_to_all():
    told, _ = call([(0, 4), (1, 4), (1, 4)])
    assert all("distributed.process_id=1 was given twice, to process 1 (pid" in text for text in told), told


def test_another_process_count_is_told_to_both():
    told, _ = call([(0, 3), (1, 2)])
    assert all(
        "distributed.num_processes=2, process 0" in text and "with 3; give all" in text for text in told
    )


def test_missing_processes_are_named():
    told, coordinator = call([(0, 4), (2, 4)], timeout=0.6)
    assert all(
        f"2 of 4 processes did not come to {coordinator} within 0.6 s: distributed.process_id 1, 3" in t
        for t in told
    )


def test_nobody_listens():
    start = time.monotonic()
    told, coordinator = call([(1, 2)], timeout=0.5)
    assert f"distributed.coordinator='{coordinator}': process 1" in told[0]
    assert "reached nobody there within 0.5 s (Connection refused)" in told[0]
    assert time.monotonic() - start < 20


def test_a_port_in_use_and_a_stranger_behind_it():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer():
            connection = other.accept()[0]
            connection.recv(100)
            connection.sendall(b"\0\0\x12\4HTTP/2\n")
            connection.close()

        stranger = threading.Thread(target=answer)
        stranger.start()
        told, coordinator = call([(1, 2)], port=port)
        stranger.join()
        assert "something listens there, but it is no process 0 that waits for process 1" in told[0]
        with pytest.raises(DistributedError, match=rf"cannot listen on port {port} of .*: it is in use"):
            meet(coordinator, 2, 0, 1.0)


@pytest.mark.parametrize("text", ["10.0.0.1", "host:", ":80", "host:99999", "host:http"])
def test_an_address_that_is_none(text):
    with pytest.raises(DistributedError, match=r"distributed.coordinator=.* is not 'host:port'"):
        parse_address(text)
    assert parse_address("[::1]:80") == ("::1", 80)


def test_off_by_default_and_missing_fields_are_named(monkeypatch):
    initialize_distributed(DistributedConfig())
    assert not jax.distributed.is_initialized()
    for config in (DistributedConfig(num_processes=2, process_id=0), DistributedConfig(coordinator="host:1")):
        with pytest.raises(DistributedError, match=r"distributed\.coordinator="):
            initialize_distributed(config)
    with pytest.raises(DistributedError, match=r"distributed.heartbeat_timeout=0: expected 4 s or more"):
        initialize_distributed(DistributedConfig(auto=True, heartbeat_timeout=0))

    def no_cluster(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    with pytest.raises(DistributedError, match=r"distributed.auto=True, but jax finds no cluster"):
        initialize_distributed(DistributedConfig(auto=True))


def test_an_error_of_a_single_process_passes():
    with pytest.raises(KeyError), leaving_at_once(DistributedConfig()):
        raise KeyError


def relay(text, process_id):
    out = io.BytesIO()
    stderr_pipe.relay(io.BytesIO(text.encode()), out, process_id, 4, "host:80")
    return out.getvalue().decode()


def test_lines_carry_the_number_of_the_process():
    assert relay("one\ntwo", 0) == "one\ntwo"
    assert relay("one\ntwo\n", 3) == "[process 3] one\n[process 3] two\n"


def test_the_abort_is_put_into_words():
    lines = relay("before\n" + HEARTBEAT, 2).splitlines()
    assert lines[0] == "[process 2] before" and len(lines) == 2
    assert lines[1].startswith("[process 2] LostProcess: processes 1, 3 of 4 died, or hangs")
    assert "resumes from its newest checkpoint" in lines[1]
    gone = FATAL + "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task died"
    assert "process 0 of 4, the coordinator at host:80, died or cannot be reached" in relay(gone, 1)
    barrier = FATAL + "INTERNAL: Shutdown barrier has failed.\n"
    assert "LostProcess: the 4 processes did not all reach a barrier in time" in relay(barrier, 0)
    assert "Task 9 is odd" in relay(FATAL + "Task 9 is odd", 0), "what is unknown is shown"


def test_stderr_goes_on_after_signals_and_a_kill():
    program = (
        "import os, signal, sys, time; from runtime.stderr_pipe import pipe_stderr; pipe_stderr(1, 2, '');"
        "print('python', file=sys.stderr); os.write(2, b'C++\\n'); print('out', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        text=True,
    )
    assert process.stdout.readline() == "out\n"
    process.send_signal(signal.SIGKILL)
    assert process.communicate(timeout=60)[1] == "[process 1] python\n[process 1] C++\n"


def test_the_program_tells_a_dead_coordinator(tmp_path):
    """Within the time asked for, without a trace of python or C++, and with a status that is not 0."""
    flags = [
        f"--config.distributed.{name}={value}"
        for name, value in {
            "coordinator": f"127.0.0.1:{free_port()}",
            "num_processes": 2,
            "process_id": 1,
            "connect_timeout": 1,
        }.items()
    ]
    command = [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}", *flags]
    env = {**os.environ, "GLIBC_TUNABLES": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.startswith("DistributedError: distributed.coordinator=")
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_greeting_is_not_fooled():
    """A caller that says nothing sensible is passed over, and the processes still meet."""
    port = free_port()
    told = []
    first = threading.Thread(target=lambda: told.append(call([(0, 2)], port=port)[0]))
    first.start()
    for text in (b"GET / HTTP/1.1\r\n\r\n", json.dumps({"process_id": 1}).encode() + b"\n"):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as scanner:
                    scanner.sendall(text)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    told.append(call([(1, 2)], port=port)[0])
    first.join(30)
    assert told == [[""], [""]]

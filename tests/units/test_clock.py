"""Time attribution, speed, MFU, what a person sees, and stopping on a signal."""

import io
import os
import signal

import jax
import pytest
from rich.console import Console

from runtime.clock import Clock, accelerator_peak, measured_cpu_flops, mfu, peak_flops
from runtime.preemption import Preemption
from runtime.progress import Progress, progress_line


class Time:
    """A clock that moves when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def __iadd__(self, seconds):
        self.now += seconds
        return self


def test_time_is_attributed_once():
    time = Time()
    clock = Clock(now=time)
    with clock.measure("data"):
        time += 1
    time += 2
    with clock.measure("step"):
        time += 3
        with clock.measure("checkpoint"):
            time += 4
        time += 5
    with pytest.raises(KeyError), clock.measure("eval"):
        time += 6
        raise KeyError
    assert clock.seconds() == {"data": 1, "step": 8, "checkpoint": 4, "eval": 6, "other": 2, "total": 21}


def test_speed_leaves_out_compilation_evaluation_and_checkpoints():
    time = Time()
    clock = Clock(window=4, now=time)
    assert clock.tokens_per_second() is None and clock.eta(10) is None
    with clock.measure("compile"):
        time += 60
    for step in range(8):
        with clock.measure("data"):
            time += 0.5
        with clock.measure("step"):
            time += 1.5 if step < 3 else 0.5
        clock.count(tokens=100)
        with clock.measure("eval"):
            time += 7
        with clock.measure("checkpoint"):
            time += 9
    assert clock.tokens_per_second() == pytest.approx(100.0), "the window is four steps of 1 s"
    assert clock.steps_per_second() == pytest.approx(1.0)
    assert clock.eta(30) == pytest.approx(30.0)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("Something new", None),
    ],
)
def test_known_accelerators(kind, peak):
    assert accelerator_peak(kind) == peak


def test_cpu_devices_share_the_measured_rate():
    share = peak_flops(jax.devices("cpu")[0])
    assert share * jax.local_device_count() == measured_cpu_flops() > 1e8
    assert mfu(2 * share, 4, share) == pytest.approx(0.5)
    assert mfu(None, 4, share) is None and mfu(1.0, 4, None) is None


def test_progress_line():
    values = {"loss": 2.34561, "bpb": 1.6923, "tokens_per_second": 12345.0, "mfu": 0.41, "eta": 3725.4}
    assert progress_line(120, 1000, values) == (
        "step 120/1000  loss 2.3456  bpb 1.692  12.3k tok/s  mfu 41.0%  eta 1:02:05"
    )
    assert progress_line(1, 2, {"loss": float("nan"), "mfu": None}) == "step 1/2  loss nan"


def test_plain_progress_does_not_spam():
    time, out = Time(), io.StringIO()
    with Progress(2000, console=Console(file=out, width=200), now=time) as progress:
        for step in range(1, 2001):
            progress.update(step, {"loss": 1.0})
            time += 0.1
        progress.note("eval [held out] 0.9")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 1/2000") and lines[-1].startswith("step 2000/2000")
    assert "eval [held out] 0.9" in lines
    assert 5 <= len(lines) <= 10, "5, 10, 20, 40, 60 s apart"


def test_live_progress_leaves_one_line():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with Progress(10, console=console) as progress:
        for step in range(1, 11):
            progress.update(step, {"loss": 1.0})
    assert out.getvalue().count("\n") <= 3 and "step 10/10" in out.getvalue().splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number):
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.should_stop(1)
        os.kill(os.getpid(), number)
        assert preemption.should_stop(2) and preemption.reason == number.name
    assert signal.getsignal(number) == before


def test_a_second_interrupt_is_immediate():
    with pytest.raises(KeyboardInterrupt), Preemption():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

"""The host process: memory that XLA's CPU backend can reuse, and how much was used at most."""

from __future__ import annotations

import os
import pathlib
import sys

import jax

# XLA on CPU takes every temporary fresh from malloc. With glibc's defaults each comes from the kernel page
# by page, and goes back: half of a training step on CPU (121 ms against 66 ms for the quickstart's). So keep
# freed memory, and take it in huge pages.
TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={2**32}",
        f"glibc.malloc.trim_threshold={2**34}",
        f"glibc.malloc.top_pad={2**28}",
    )
)
ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


def restart_with_tuned_malloc() -> None:
    """On a Linux host without accelerators, run this same command again with ``TUNABLES`` set.

    glibc reads them only when a process starts. Call it first thing in a program, never in a library. It does
    nothing where ``GLIBC_TUNABLES`` is set already: set it to anything to keep the defaults.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    if any(pathlib.Path(device).exists() for device in ACCELERATORS):
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def peak_memory() -> dict[str, int]:
    """Bytes of memory used at most so far: "host" by this process, "device" by the busiest accelerator.

    A platform that does not tell one of them leaves it out.
    """
    peaks = {}
    if sys.platform != "win32":
        import resource  # not there on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if known := [peak for peak in told if peak is not None]:
        peaks["device"] = max(known)
    return peaks

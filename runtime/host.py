"""The host process: memory that XLA's CPU backend can reuse."""

from __future__ import annotations

import os
import pathlib
import sys

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

"""Memory of the host between steps: kept by the process, so that a step on CPU does not fault it in again."""

from __future__ import annotations

import ctypes
import platform

# mallopt(3): no separate mapping for large blocks, one heap for all threads, and that heap not given back.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Make malloc keep what is freed; call before threads start, that is, before jax finds its devices.

    XLA allocates the buffers of a computation on the CPU anew each time it runs. By default glibc maps and
    unmaps them, and the kernel clears every page again: a quarter of a training step of a small model. The
    process holds on to the most memory it ever used.

    Returns:
        Whether it was done; False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all([mallopt(option, value) == 1 for option, value in settings])

"""Keep freed memory in the process: on Linux, glibc otherwise returns every large array to the kernel and fetches it
again, page by page, which can cost more than the arithmetic of a small model (docs/training.md, Speed on CPUs)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

# malloc.h: parameters of mallopt(3), and the variables by which a user sets them himself.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
_KEPT, _AHEAD = 2**31 - 1, 2**28


def keep_memory() -> bool:
    """For programs, not for libraries: holds for the whole process. True if it took effect; a user's own settings and
    other systems are left alone."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        return all([mallopt(_MMAP_THRESHOLD, _KEPT), mallopt(_TRIM_THRESHOLD, _KEPT), mallopt(_TOP_PAD, _AHEAD)])
    return False

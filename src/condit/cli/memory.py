"""Keeps freed memory in the process. On Linux, glibc otherwise returns every large array to the kernel and requests it
again, page by page, which can take longer than the arithmetic of a small model (docs/training.md, Speed on CPUs)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

# malloc.h: parameters of mallopt(3), and the environment variables that set them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
_KEPT, _AHEAD = 2**31 - 1, 2**28


def keep_memory() -> bool:
    """Applies to the whole process, so only programs call it. Returns whether it took effect: not on other systems, nor
    if the user has set the variables."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        return all([mallopt(_MMAP_THRESHOLD, _KEPT), mallopt(_TRIM_THRESHOLD, _KEPT), mallopt(_TOP_PAD, _AHEAD)])
    return False

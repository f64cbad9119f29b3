"""How the C library's allocator treats the large tensors of CPU runs."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_THRESHOLD = 32 * 2**20  # the most that glibc takes
KEEP = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let freed tensors of up to 32 MB be used again instead of going back to the kernel. Returns whether that was done.

    glibc gives large blocks back when they are freed, and the kernel hands out zeroed pages anew at each use: in training on a
    CPU that is 3 to 8 % of the time. The peak of memory stays as it was (measured: docs/log.md). Linux with glibc only; does
    nothing where the user has set MALLOC_* or GLIBC_TUNABLES, or runs another allocator by LD_PRELOAD.
    """
    chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, KEEP))

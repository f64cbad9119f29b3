"""How the C library's allocator treats the large tensors of CPU runs."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
MMAP_THRESHOLD = 32 * 2**20  # the most that glibc takes
KEEP = 2**31 - 1


def keep_freed_memory(several: bool = False) -> bool:
    """Let freed tensors of up to 32 MB be used again instead of going back to the kernel. Returns whether that was done.

    glibc gives large blocks back when they are freed, and the kernel hands out zeroed pages anew at each use: in training on a
    CPU that is 3 to 8 % of the time. The peak of memory stays as it was (measured: docs/log.md). Linux with glibc only; does
    nothing where the user has set MALLOC_* or GLIBC_TUNABLES, or runs another allocator by LD_PRELOAD.
    several: of several processes; gloo's threads then take their buffers from the one heap, not each from one of its own.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    if several:
        mallopt(M_ARENA_MAX, 1)
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, KEEP))


def give_back() -> bool:
    """Give the kernel what `keep_freed_memory` has kept: between parts of a run whose tensors do not fit one another's holes.
    Returns whether there was any. Takes milliseconds, and new pages at the next use."""
    trim = _function("malloc_trim")
    return trim is not None and bool(trim(0))


def _function(name: str) -> Any | None:
    """Of the C library, where it is glibc's and left to us; else None."""
    chosen = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # musl has none
        return None

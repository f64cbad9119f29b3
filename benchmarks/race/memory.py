"""Resident memory of this process, MiB, and its peak since a moment of one's choosing (Linux; elsewhere since the start)."""

from __future__ import annotations

import contextlib
import resource
import sys


def resident() -> float:
    """What is resident now; the peak where the system does not say."""
    return _status("VmRSS")


def peak() -> float:
    """The most that was resident since `restart_peak`, or since the start.

    Not getrusage's figure: a process that another started inherits that one's peak there.
    """
    return _status("VmHWM")


def restart_peak() -> None:
    """Let the peak begin anew from what is resident now, where the system allows it."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _status(name: str) -> float:
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)

"""How many CPU threads to compute with. Two threads on a busy two-core machine can be ten times slower than one."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def choose_threads(wanted: int | None, cores: int, load: float) -> tuple[int, str]:
    """Threads and why. wanted: the configuration's word; load: the machine's 1-minute load average before this run."""
    if wanted is not None:
        advice = f"; the machine has {cores} cores, more threads than cores are slower" if wanted > cores else ""
        return wanted, f"threads: {wanted}, as configured{advice}"
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"]), f"threads: {os.environ['OMP_NUM_THREADS']}, from OMP_NUM_THREADS"
    free = max(1, cores - round(load))
    if free < cores:
        return free, f"threads: {free} of {cores} cores; others keep about {load:.1f} busy (set `threads` to decide yourself)"
    return cores, f"threads: {cores}"


def set_threads(wanted: int | None) -> str:
    """Apply choose_threads to torch; returns the reason, to be shown."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    count, reason = choose_threads(wanted, usable_cores(), load)
    torch.set_num_threads(count)
    return reason

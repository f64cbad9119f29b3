"""A torch.profiler trace of a piece of a run, for experts. That it cannot be taken never stops a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROWS = 40  # operators in the table


@contextlib.contextmanager
def traced(folder: Path, name: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Write folder/<name>.json.gz (Chrome's trace format) and folder/<name>.txt (the operators that take longest) of what runs inside.

    Nothing is written of a piece that fails. warn is told where the profiler does, or the disk.
    """
    profiler = _started(warn)
    try:
        yield
    except BaseException:
        if profiler is not None:
            with contextlib.suppress(Exception):
                profiler.stop()
        raise
    if profiler is None:
        return
    try:
        profiler.stop()
        _write(profiler, folder, name)
    except Exception as error:  # of the profiler, of Kineto, of the disk: a trace is no reason to lose a run
        warn(f"the profile could not be written to {folder}: {type(error).__name__}: {error}")


def _started(warn: Callable[[str], None]) -> torch.profiler.profile | None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
    except Exception as error:
        warn(f"no profile is taken: the profiler does not start: {type(error).__name__}: {error}")
        return None
    return profiler


def _write(profiler: torch.profiler.profile, folder: Path, name: str) -> None:
    """Under temporary names first, so that what is there is whole."""
    folder.mkdir(exist_ok=True)
    trace, table = folder / f".{name}.tmp.json.gz", folder / f".{name}.tmp.txt"
    try:
        profiler.export_chrome_trace(str(trace))
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table.write_text(profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60) + "\n", encoding="utf-8")
        trace.replace(folder / f"{name}.json.gz")
        table.replace(folder / f"{name}.txt")
    finally:
        for left in (trace, table):
            left.unlink(missing_ok=True)

"""Bounds for templates that come with models: time and memory of one rendering, and no way out of Jinja's sandbox."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SECONDS = 20.0  # of one conversation; real templates take a millisecond
MEMORY = 2 << 30  # bytes that the process may grow by meanwhile
LONGEST = 1 << 28  # characters of a rendered conversation
LOOK = 0.25  # seconds between two looks


class TooMuch(Exception):
    """A rendering that does not end, or grows without end."""


@contextlib.contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raise TooMuch inside the block when it has run for so long, or the process has grown by so many bytes.

    It is looked at by a timer signal between two steps of Python, so a single step (a product of strings) is seen when it is over.
    Outside the main thread, where SIGALRM is in use, and on systems without it, there is no bound.
    """
    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not timed or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return
    before, looks = _resident(), 0

    def look(number: int, frame: FrameType | None) -> None:
        nonlocal looks
        looks += 1
        if looks * LOOK >= seconds:
            raise TooMuch(f"it does not end within {seconds:g} seconds")
        if _resident() - before > memory:
            raise TooMuch(f"it takes more than {memory >> 20} MiB of memory")

    previous = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0

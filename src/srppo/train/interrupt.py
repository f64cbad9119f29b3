"""Ctrl-C and SIGTERM (a scheduler's pre-emption), taken at safe points: one asks the loop to save and stop, a second stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from srppo.errors import TrainingStopped
from srppo.world import world

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + signal: what a shell reports for a program that it ended


ONE_SIGNAL = 10.0  # seconds: of several processes each gets a Ctrl-C twice, from the terminal and from torchrun


class Interrupted(TrainingStopped):
    """The user or the scheduler stopped the run; the state was saved. The exit code is 130 after Ctrl-C and 143 after SIGTERM."""

    exit_code = CODES[signal.SIGINT]


class Terminated(KeyboardInterrupt):
    """A second SIGTERM: stop at once, whatever is lost."""

    exit_code = CODES[signal.SIGTERM]


class StopRequested(Exception):
    """Raised by `Interrupt.check` inside a loop; never leaves it."""


class Interrupt:
    """Context in which the first SIGINT or SIGTERM only sets a flag. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.requested = False
        self.signal = signal.SIGINT  # that came first
        self._since = 0.0
        self._previous: dict[int, Any] = {}  # what signal.signal returned

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if isinstance(error, Interrupted):  # raised in all processes, of which one may have had the signal
            error.exit_code = CODES[signal.Signals(world().most(int(self.signal) if self.requested else 0) or self.signal)]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if not world().alone and time.monotonic() - self._since < ONE_SIGNAL:
                return
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        self.requested, self.signal, self._since = True, signal.Signals(number), time.monotonic()
        if world().local_rank:
            return  # one of a machine speaks
        again = "Ctrl-C again" if number == signal.SIGINT else "Another SIGTERM"
        when = "" if world().alone else f" {ONE_SIGNAL:.0f} seconds later"
        message = f"\nstopping: the work at hand is finished and saved first. {again}{when} stops at once, back to the last checkpoint.\n"
        os.write(2, message.encode())  # print is not safe in a signal handler

    def check(self) -> None:
        """Raise StopRequested where a signal came in, to any of the run's processes: all ask at the same points, and all stop."""
        if found := world().most(int(self.signal) if self.requested else 0):
            self.signal = signal.Signals(found)
            raise StopRequested

    def poll(self, *_: object) -> None:
        """Raise StopRequested where a signal came in to this process, whatever the others do. A progress callback of decoding."""
        if self.requested:
            raise StopRequested

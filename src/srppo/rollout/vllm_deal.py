"""Dealing a batch's rows to the threads that ask the servers: a row that fails goes back, for another server or a later try."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 15.0  # seconds between two tries
LEAST_TRIES = 4  # of one row, before it is given up
QUIET = 30.0  # seconds between two words about one server


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row: 0.25, 0.5, 1 … 15."""
    return float(min(FIRST_PAUSE * 2 ** min(failures - 1, 30), LONGEST_PAUSE))


class Answered(NamedTuple):
    row: int
    ids: list[int]
    logprobs: list[float]


class Said(NamedTuple):
    """Something for the user."""

    text: str


class Failed(NamedTuple):
    """An error that no other try would change."""

    error: BaseException


Event = Answered | Said | Failed


class Deal:
    """Which rows wait, which are being asked for, and what has come in. All methods may be called from any thread.

    patience: seconds that all servers may be failing, or one row on servers that otherwise answer. clock: time.monotonic, whatever
    happens to the system's date.
    """

    def __init__(self, rows: int, servers: int, patience: float, clock: Callable[[], float] = time.monotonic):
        self.patience = patience
        self._clock, self._servers = clock, servers
        self._waiting, self._open = deque(range(rows)), rows
        self._events: deque[Event] = deque()
        self._failing: dict[str, float] = {}  # server -> since when
        self._told: dict[str, float] = {}  # server -> when its failing was last told
        self._tries: dict[int, tuple[int, float]] = {}  # row -> failures, since when
        self._changed = threading.Condition()
        self._stopped = False

    def take(self) -> int | None:
        """The next row to ask for; waits while all are being asked for, since one may come back. None when there will be no more."""
        with self._changed:
            while not self._waiting and self._open and not self._stopped:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting and not self._stopped else None

    def answer(self, server: str, row: int, ids: list[int], logprobs: list[float]) -> None:
        with self._changed:
            self._open -= 1
            self._tries.pop(row, None)
            self._post(Answered(row, ids, logprobs))
        self.works(server)

    def works(self, server: str) -> None:
        """The server has done what it was asked."""
        with self._changed:
            since = self._failing.pop(server, None)
            if since is not None and self._told.get(server, -math.inf) >= since:
                self._post(Said(f"the vLLM server at {server} is back after {self._clock() - since:.1f} s"))

    def hand_back(self, row: int, reason: str) -> float:
        """A row that got no answer. Returns the seconds to wait; raises GivenUp where it has failed for too long."""
        with self._changed:
            failures, since = self._tries.get(row, (0, self._clock()))
            failures += 1
            self._tries[row] = failures, since
            if failures >= LEAST_TRIES and self._clock() - since >= self.patience:
                raise GivenUp(f"a prompt got no answer in {failures} tries ({reason})")
            self._waiting.append(row)
            self._changed.notify_all()
            return pause_after(failures)

    def fails(self, server: str, reason: str) -> None:
        """The server gave no answer. Raises GivenUp where all servers have been failing for `patience` seconds."""
        with self._changed:
            now = self._clock()
            if server not in self._failing:
                self._failing[server] = now
            others = self._servers - len(self._failing)
            if now - self._told.get(server, -math.inf) >= QUIET:
                self._told[server] = now
                goes_on = "its rows go to the others meanwhile" if others else f"it is asked again for {self.patience:g} s"
                self._post(Said(f"the vLLM server at {server} does not answer ({reason}); {goes_on}"))
            if not others and now - max(self._failing.values()) >= self.patience:
                raise GivenUp(f"the vLLM server at {server} has not answered for {self.patience:g} s ({reason})")

    def fail(self, error: BaseException) -> None:
        """End it: the main thread will raise the error."""
        with self._changed:
            self._post(Failed(error))

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """Whether nothing is left to ask for."""
        return self._stopped or not self._open

    def wait(self, seconds: float) -> None:
        """A pause, ended early by `stop` and when there is nothing left to ask."""
        end = self._clock() + seconds
        with self._changed:
            while not self._stopped and self._open and (left := end - self._clock()) > 0:
                self._changed.wait(left)

    def next(self, seconds: float = math.inf) -> Event | None:
        """What came in first; None where nothing does within so many seconds."""
        end = self._clock() + seconds
        with self._changed:
            while not self._events:
                left = end - self._clock()
                if left <= 0:
                    return None
                self._changed.wait(None if left == math.inf else left)
            return self._events.popleft()

    def _post(self, event: Event) -> None:
        self._events.append(event)
        self._changed.notify_all()


class GivenUp(Exception):
    """Tried for long enough. Never leaves the engine."""

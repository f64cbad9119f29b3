"""Seconds and peak memory of a training loop's phases."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from srppo.machine import between, read
from srppo.profiling.memory import of_device


class Phases:
    """Measures the phases of a round, one after the other. On a GPU it waits for the work that a phase has queued, at its end only."""

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._began = read()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase; one that comes more than once in a round adds up. A trace shows it as srppo/<name>."""
        with of_device(self._device).spell() as found:
            started = time.perf_counter()
            try:
                with torch.profiler.record_function(f"srppo/{name}"):
                    yield
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
            finally:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started
        for ending, peak in found.items():
            key = f"{name}{ending}"
            self._peaks[key] = max(self._peaks.get(key, 0.0), peak)

    def seconds(self, name: str) -> float:
        """Of a phase since the last `take`."""
        return self._seconds.get(name, 0.0)

    def take(self) -> dict[str, float]:
        """The metrics since the last call: timing/<phase>, memory/<phase>, and of all the time CPU use and waiting for a core."""
        now = read()
        spell = between(self._began, now)
        out = {f"timing/{name}": seconds for name, seconds in self._seconds.items()} | {"timing/cpu": spell.cpu}
        out |= {} if spell.waited is None else {"timing/waited": spell.waited}
        out |= {f"memory/{name}": peak for name, peak in self._peaks.items()}
        self._seconds, self._peaks, self._began = {}, {}, now
        return out

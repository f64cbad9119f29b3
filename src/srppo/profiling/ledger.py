"""What the stages of a run cost, over all the processes that worked on it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from srppo.profiling.memory import resident


class Ledger:
    """Seconds and peak resident memory by stage. A stage that is resumed adds up."""

    def __init__(self, before: Any = None):
        """before: `stages` as an earlier process left them; what is damaged in it is dropped."""
        self.stages: dict[str, dict[str, float]] = {}
        self._open: dict[str, float] = {}  # stages that go on, and when they began
        for name, cost in (before if isinstance(before, dict) else {}).items():
            figures: list[Any] = [cost.get(key) for key in ("seconds", "peak_rss_mb")] if isinstance(cost, dict) else [None]
            if all(isinstance(f, (int, float)) and math.isfinite(f) for f in figures):
                self._count(str(name), *figures)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage, also one that fails or is stopped."""
        started, found = time.monotonic(), {"": 0.0}
        self._open[name] = started
        try:
            with resident().spell() as found:
                yield
        finally:
            self._open.pop(name, None)
            self._count(name, time.monotonic() - started, found[""])

    def seconds(self, name: str) -> float:
        """Of a stage so far, whether it goes on or not."""
        begun = self._open.get(name)
        return self.stages.get(name, {}).get("seconds", 0.0) + (0.0 if begun is None else time.monotonic() - begun)

    def so_far(self) -> dict[str, dict[str, float]]:
        """`stages`, with those that go on."""
        peaks = {name: self.stages.get(name, {}).get("peak_rss_mb", 0.0) for name in [*self.stages, *self._open]}
        return {name: {"seconds": self.seconds(name), "peak_rss_mb": peak} for name, peak in peaks.items()}

    def add(self, other: Ledger) -> None:
        """Count another's stages too."""
        for name, cost in other.stages.items():
            self._count(name, cost["seconds"], cost["peak_rss_mb"])

    def _count(self, name: str, seconds: float, peak: float) -> None:
        cost = self.stages.setdefault(name, {"seconds": 0.0, "peak_rss_mb": 0.0})
        cost["seconds"] += seconds
        cost["peak_rss_mb"] = max(cost["peak_rss_mb"], peak)

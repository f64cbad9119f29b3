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
        for name, cost in (before if isinstance(before, dict) else {}).items():
            figures: list[Any] = [cost.get(key) for key in ("seconds", "peak_rss_mb")] if isinstance(cost, dict) else [None]
            if all(isinstance(f, (int, float)) and math.isfinite(f) for f in figures):
                self._count(str(name), *figures)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage, also one that fails or is stopped."""
        started, found = time.monotonic(), {"": 0.0}
        try:
            with resident().spell() as found:
                yield
        finally:
            self._count(name, time.monotonic() - started, found[""])

    def add(self, other: Ledger) -> None:
        """Count another's stages too."""
        for name, cost in other.stages.items():
            self._count(name, cost["seconds"], cost["peak_rss_mb"])

    def _count(self, name: str, seconds: float, peak: float) -> None:
        cost = self.stages.setdefault(name, {"seconds": 0.0, "peak_rss_mb": 0.0})
        cost["seconds"] += seconds
        cost["peak_rss_mb"] = max(cost["peak_rss_mb"], peak)

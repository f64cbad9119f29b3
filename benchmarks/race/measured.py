"""What every side of a race measures around its rounds, and how it answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.race import memory
from benchmarks.race.job import Job, StepCount


class Measured:
    """Memory and optimizer steps from here on; to be made when a tiny run has loaded all libraries."""

    def __init__(self, job: Job):
        self.job = job
        memory.restart_peak()
        if job.device != "cpu":
            import torch

            torch.cuda.reset_peak_memory_stats()
        self.before, self.steps = memory.resident(), StepCount()

    def answer(self, said: Mapping[str, Any], peak: float, gpu_peak: float | None = None) -> None:
        """Write the side's answer where it was asked for. peak, gpu_peak: MiB, while rounds ran; the GPU's is PyTorch's if not given."""
        out = {**said, **self.steps.remove(), "rss_before_mb": self.before, "rss_peak_mb": peak}
        if self.job.device != "cpu":
            import torch

            out["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20 if gpu_peak is None else gpu_peak
        Path(sys.argv[2]).write_text(json.dumps(out))


def phases(began: Sequence[float], generated: Sequence[float], scored: Sequence[float]) -> dict[str, list[float]]:
    """Seconds by phase of each round. began: when each round began, and the end of the last."""
    spans = list(zip(began, generated, scored, began[1:]))
    return {
        "rollout": [b - a for a, b, _, _ in spans],
        "score": [c - b for _, b, c, _ in spans],
        "update": [d - c for _, _, c, d in spans],
    }


def noting(generate: Callable[..., Any], now: Callable[[], float], moments: list[float]) -> Callable[..., Any]:
    """`generate`, which also notes when it was done."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        out = generate(*args, **kwargs)
        moments.append(now())
        return out

    return noted

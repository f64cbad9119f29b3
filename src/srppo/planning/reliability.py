"""How often a run on many GPUs is likely to be interrupted, and how often it should therefore save. Seconds and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

# GPU-seconds from one unexpected interruption to the next: 419 in 54 days on 16,384 H100s (Llama Team 2024, arXiv 2407.21783, 3.3.4).
GPU_SECONDS = 54 * 86_400 * 16_384 / 419
WRITTEN = 1e9  # bytes a second that a machine writes to the file system of the run folder, assumed
LEAST_WRITE = 1.0  # seconds of any checkpoint: files, checksums, waiting for one another


@dataclass(frozen=True)
class Reliability:
    """between_failures: mean time from one interruption to the next. interval: between checkpoints, at which least is lost."""

    between_failures: float
    checkpoint_bytes: int
    checkpoint_seconds: float
    interval: float

    @property
    def lost(self) -> float:
        """Share of the time that is spent on writing checkpoints, and on doing again what came after the last, with that interval."""
        return self.checkpoint_seconds / self.interval + self.interval / (2 * self.between_failures)


def reliability(processes: int, machines: int, checkpoint: int) -> Reliability:
    """sqrt(2 C M) between checkpoints that take C, with a mean time M between failures, is the best to first order (Young 1974,
    doi 10.1145/361147.361115; Daly 2006, doi 10.1016/j.future.2004.11.016)."""
    mean = GPU_SECONDS / processes
    writing = max(LEAST_WRITE, checkpoint / (WRITTEN * machines))
    return Reliability(mean, checkpoint, writing, math.sqrt(2 * writing * mean))

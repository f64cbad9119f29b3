"""How sure a mean is: bootstrap intervals over prompts, and paired differences between two stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DRAWS = 4000
CHUNK = 1 << 22  # picks at a time; a pick takes 16 bytes, so 64 MiB


@dataclass(frozen=True)
class Gain:
    """Mean score of one stage minus another's on the same prompts, with its 95 % interval. Shares of 1."""

    gain: float
    low: float
    high: float
    n: int  # prompts

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979) of per-prompt scores. The draws are fixed by the seed."""
    x = np.asarray(values, dtype=np.float64)
    rng, rows = np.random.default_rng(seed), max(1, CHUNK // max(1, len(x)))
    sizes = [min(rows, DRAWS - done) for done in range(0, DRAWS, rows)]  # in parts, for the memory: the draws are the same
    means = np.concatenate([x[rng.integers(len(x), size=(size, len(x)))].mean(1) for size in sizes])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_gain(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], group: str) -> Gain | None:
    """Sampled score of `after` minus `before`, both rows of evaluation/<stage>.jsonl, on a group's prompts; None without any.

    Paired: the difference is taken prompt by prompt, so what makes a prompt hard cancels.
    """
    theirs, ours = (
        {(r["row"], r["prompt"]): float(np.mean(r["sampled_scores"])) for r in rows if r["group"] == group and r["sampled_scores"]}
        for rows in (before, after)
    )
    gaps = [ours[prompt] - theirs[prompt] for prompt in theirs if prompt in ours]
    if not gaps:
        return None
    return Gain(float(np.mean(gaps)), *bootstrap_interval(gaps), len(gaps))

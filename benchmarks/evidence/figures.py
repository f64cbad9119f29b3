"""What the tables hold: means over seeds and paired differences, with bootstrap intervals over seeds and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

Row = dict[str, Any]
Rows = dict[tuple[str, int], Row]  # (name, seed)
GROUPS = {"with_demonstrations": "with", "without_demonstrations": "without"}
DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A share (or a difference of shares) with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out zero, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def points(self) -> str:
        return f"{100 * self.value:+.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})".replace("-", "−")


def seeds_of(rows: Rows, *names: str) -> list[int]:
    """The seeds that all of the names have."""
    found = [{seed for name, seed in rows if name == wanted} for wanted in names]
    return sorted(set.intersection(*found)) if found else []


def right(row: Row, group: str, kind: str = "sampled") -> np.ndarray:
    """[prompts] share of right samples, or 0 and 1 of the greedy answers."""
    told = row["groups"][group]
    if kind == "greedy":
        return np.array([int(c) for c in told["greedy"]], dtype=float)
    return np.array([int(c) for c in told["right"]], dtype=float) / float(told["samples"])


def estimate(parts: Sequence[np.ndarray]) -> Estimate:
    """Mean over seeds of the means over prompts [prompts] of each. The interval is the wider of two (ours): of the bootstrap that draws
    seeds, then prompts within each, which is too narrow with few seeds where they differ; and of Student's over the seeds' means."""
    rng, count = np.random.default_rng(0), len(parts)
    means = np.stack([x[rng.integers(len(x), size=(DRAWS * count, len(x)))].mean(1).reshape(DRAWS, count) for x in parts])
    picked = rng.integers(count, size=(DRAWS, count))
    draws = means[picked, np.arange(DRAWS)[:, None], np.arange(count)[None]].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    each = np.array([x.mean() for x in parts])
    mean = float(each.mean())
    if count > 1:
        half = float(student.ppf(0.975, count - 1) * each.std(ddof=1) / np.sqrt(count))
        low, high = min(low, mean - half), max(high, mean + half)
    return Estimate(mean, float(low), float(high))


def accuracy(rows: Rows, name: str, group: str, kind: str = "sampled") -> Estimate:
    return estimate([right(rows[name, seed], group, kind) for seed in seeds_of(rows, name)])


def gain(rows: Rows, name: str, other: str, group: str, kind: str = "sampled") -> Estimate:
    """name minus other, paired over seeds and prompts."""
    seeds = seeds_of(rows, name, other)
    return estimate([right(rows[name, s], group, kind) - right(rows[other, s], group, kind) for s in seeds])


def gain_difference(rows: Rows, one: tuple[str, str], other: tuple[str, str], group: str) -> Estimate:
    """The gain of one (name, start) minus that of another; a seed asks all of them the same prompts."""

    def gained(pair: tuple[str, str], seed: int) -> np.ndarray:
        return right(rows[pair[0], seed], group) - right(rows[pair[1], seed], group)

    return estimate([gained(one, s) - gained(other, s) for s in seeds_of(rows, *one, *other)])


def each_gain(rows: Rows, name: str, other: str, group: str) -> list[float]:
    return [float((right(rows[name, s], group) - right(rows[other, s], group)).mean()) for s in seeds_of(rows, name, other)]


def length(rows: Rows, name: str, group: str) -> float:
    """Mean over seeds of the samples' mean tokens, EOS included."""
    return float(np.mean([rows[name, s]["groups"][group]["length"] for s in seeds_of(rows, name)]))


def lost(rows: Rows, name: str, group: str) -> Estimate | None:
    """Of the prompts that the base answers right (greedy), the share that the model no longer does."""
    parts = []
    for seed in seeds_of(rows, name, "base"):
        knew = right(rows["base", seed], group, "greedy") == 1
        if knew.any():
            parts.append(1 - right(rows[name, seed], group, "greedy")[knew])
    return estimate(parts) if parts else None


def curve(rows: Rows, name: str, what: str) -> np.ndarray:
    """[rounds] mean over seeds of a metric of the rounds; the shortest run's length."""
    found = [rows[name, seed]["curves"][what] for seed in seeds_of(rows, name)]
    shortest = min(map(len, found))
    return np.mean([c[:shortest] for c in found], 0)

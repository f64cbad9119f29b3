"""Whether one stage is better than another, or only luckier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from srppo.report.record import Record

DRAWS = 2000


@dataclass(frozen=True)
class Difference:
    """Sampled accuracy of one stage minus another's on a group, with a 95 % interval. Shares of 1."""

    gain: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def difference(record: Record, group: str, stage: str, other: str) -> Difference | None:
    """What the summary says; else paired over prompts by bootstrap (Efron 1979) from the answers; else from the two intervals.

    None where a stage was not evaluated on the group, or not scored.
    """
    a, b = record.results(stage).get(group, {}), record.results(other).get(group, {})
    if a.get("sampled") is None or b.get("sampled") is None:
        return None
    said = ((record.summary.get("srppo_gain") or {}).get(other) or {}).get(group) if stage == "srppo" else None
    if said:
        return Difference(said["gain"], said["low"], said["high"])
    gain = a["sampled"] - b["sampled"]
    pairs = _paired(record, group, stage, other)
    if len(pairs) > 1:
        values = np.asarray(pairs)
        picks = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
        low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
        return Difference(gain, float(low), float(high))
    half = math.hypot(_half_width(a), _half_width(b))  # as if independent: too wide rather than too narrow
    return Difference(gain, gain - half, gain + half)


def _paired(record: Record, group: str, stage: str, other: str) -> list[float]:
    """For each prompt that both stages answered, the difference of its mean sample score."""
    scores = []
    for name in (stage, other):
        rows = [r for r in record.answers.get(name, []) if r.get("group") == group and r.get("sampled_scores")]
        scores.append({(r.get("row"), r.get("prompt")): float(np.mean(r["sampled_scores"])) for r in rows})
    return [scores[0][key] - scores[1][key] for key in scores[0] if key in scores[1]]


def _half_width(result: dict[str, float]) -> float:
    """Of the 95 % interval: the given one, or the normal approximation of a share of n."""
    low, high = result.get("sampled_low"), result.get("sampled_high")
    if low is not None and high is not None:
        return (high - low) / 2
    p, n = result["sampled"], max(1.0, result.get("n") or 1.0)
    return 1.96 * math.sqrt(max(p * (1 - p), 0.25 / n) / n)

"""Whether one stage is better than another, or only luckier."""

from __future__ import annotations

import math

from srppo.intervals import Gain, paired_gain
from srppo.report.record import Record

_NEEDED = {"group", "row", "prompt", "sampled_scores"}


def difference(record: Record, group: str, stage: str, other: str) -> Gain | None:
    """Sampled accuracy of one stage minus another's: paired over prompts where the answers are there, else from the summary's intervals.

    None where a stage was not evaluated on the group, or not scored.
    """
    a, b = record.results(stage).get(group, {}), record.results(other).get(group, {})
    if a.get("sampled") is None or b.get("sampled") is None:
        return None
    ours, theirs = ([r for r in record.answers.get(s, []) if r.keys() >= _NEEDED] for s in (stage, other))
    found = paired_gain(theirs, ours, group)
    if found is not None and found.n > 1:
        return found
    gain, half = a["sampled"] - b["sampled"], math.hypot(_half_width(a), _half_width(b))  # as if independent: too wide if anything
    return Gain(gain, gain - half, gain + half, int(min(a.get("n") or 1, b.get("n") or 1)))


def _half_width(result: dict[str, float]) -> float:
    """Of the 95 % interval: the given one, or the normal approximation of a share of n."""
    low, high = result.get("sampled_low"), result.get("sampled_high")
    if low is not None and high is not None:
        return (high - low) / 2
    p, n = result["sampled"], max(1.0, result.get("n") or 1.0)
    return 1.96 * math.sqrt(max(p * (1 - p), 0.25 / n) / n)

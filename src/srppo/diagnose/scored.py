"""What a scoring function says of the samples that PPO would move towards, all of its prompts together, and what follows (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from srppo.diagnose.reward_card import Estimate, RewardCard, Verdict

NORMAL = 1.96  # half a 95 % interval, in standard errors


@dataclass(frozen=True)
class Scored:
    """Change of the mean score at the card's beta: by group of PPO's prompts, and pooled over their prompts."""

    groups: Mapping[str, Estimate]
    pooled: Estimate
    whole: bool  # every group of PPO's prompts has scores

    def verdict(self, least: int) -> Verdict | None:
        """no-go where the pooled interval lies below 0, caution where the mean is not above 0 (or a group of `least` prompts or more
        falls clearly), else go; None with fewer scored prompts than `least`."""
        value, high = self.pooled.value, self.pooled.high
        if value is None or high is None or self.pooled.n < least:
            return None
        if high < 0:
            return "no-go"
        falling = any(g.n >= least and g.high is not None and g.high < 0 for g in self.groups.values())
        return "caution" if value <= 0 or falling else "go"

    def outweighs(self, least: int) -> Verdict | None:
        """How grave the signs that go without scores may still be: go where the pooled rise is clear, caution where there is one; None,
        they stand, else and where a group has no scores."""
        if not self.whole or self.verdict(least) != "go":
            return None
        return "go" if (self.pooled.low or 0.0) > 0 else "caution"


def score_changes(card: RewardCard) -> Scored:
    """Read from the card's rows at its beta."""
    rows = [r for r in card.betas if r.group != "held-out" and r.beta == card.decision.beta]
    groups = {r.group: r.accuracy_gain for r in rows if r.accuracy_gain is not None and r.accuracy_gain.value is not None}
    return Scored(groups, pool(groups), bool(rows) and len(groups) == len(rows))


def pool(groups: Mapping[str, Estimate]) -> Estimate:
    """Mean over all prompts of the groups, each prompt counting once; the interval from theirs, as if normal. Groups are independent."""
    n = sum(g.n for g in groups.values())
    if not n:
        return Estimate(None)
    mean = sum(g.n * (g.value or 0.0) for g in groups.values()) / n
    widths = [(g.n / n * ((g.high or 0.0) - (g.low or 0.0)) / (2 * NORMAL)) ** 2 for g in groups.values()]
    half = NORMAL * math.sqrt(sum(widths))
    return Estimate(mean, mean - half, mean + half, n)

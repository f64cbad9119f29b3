"""Which SFT checkpoint to start PPO from, which to take as the reward's numerator, and how large a KL coefficient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from srppo.diagnose.evidence import Responses
from srppo.diagnose.reward_card import Candidate, Estimate
from srppo.diagnose.statistics import (
    Floats,
    effective_share,
    estimate,
    likelihood_gain,
    preference,
    standard_error,
    tempered_weights,
)
from srppo.rewards import CoherentReward

LEAST_BETA = 0.5  # below it PPO over-optimised even light SFTs in the lab: docs/results/guard_criteria.md
LEAST_EFFECTIVE = 0.5  # below it, PPO at this beta would go where the samples cannot see; chosen by hand, not tuned
FLAT = 0.005  # nats a response that make no difference; a twentieth of what a light SFT gains in the lab


@dataclass(frozen=True)
class Pair:
    """A start and a numerator, weighed on P held-out prompts."""

    start: str
    numerator: str
    auc: Floats  # [P] preference against the start's samples
    loglikelihood: Floats  # [P] of the demonstrations under the start, nats a response
    gains: dict[float, Floats]  # beta -> [P] predicted rise of it
    effective: dict[float, float]  # beta -> effective share of the samples
    beta: float = 0.0

    @property
    def gain(self) -> Estimate:
        return estimate(self.gains[self.beta]) if self.beta in self.gains else Estimate(None)

    @property
    def predicted(self) -> Floats:
        """[P] log-likelihood of the demonstrations that PPO with this pair and beta would move towards."""
        return self.loglikelihood + self.gains.get(self.beta, 0.0)

    def to_candidate(self, chosen: bool) -> Candidate:
        nll = -float(self.loglikelihood.mean())
        return Candidate(
            self.start,
            self.numerator,
            estimate(self.auc),
            self.beta,
            self.gain,
            nll,
            -float(self.predicted.mean()),
            chosen,
        )


def weigh_pair(
    start: str,
    numerator: str,
    reward: CoherentReward,
    demonstrations: Responses,
    samples: Responses,
    betas: Sequence[float],
    fixed: float | None = None,
) -> Pair:
    """Weigh one pair on the held-out prompts, and suggest its beta (or take the fixed one).

    demonstrations: P rows, one a prompt; samples: P * n rows of the start, the same prompts in the same order. betas above 0; none of
    them, no gains. fixed: a beta; its gain is None where it is not among betas. Ours.
    """
    theirs, own = demonstrations.rewards(reward, numerator)[:, 0], samples.rewards(reward, numerator)
    pair = Pair(
        start,
        numerator,
        preference(theirs, own, samples.same_as(demonstrations)),
        demonstrations.loglikelihood(start)[:, 0],
        {beta: likelihood_gain(theirs, own, beta) for beta in betas},
        {beta: float(effective_share(tempered_weights(own, beta)).mean()) for beta in betas},
    )
    return replace(pair, beta=suggest_beta(pair) if fixed is None else fixed)


def suggest_beta(pair: Pair) -> float:
    """1 (or the beta nearest to it), unless another's predicted gain is higher by more than one standard error of the difference, prompt
    by prompt; then the one with the highest, of gains equal to FLAT nats the largest beta, which moves the policy least.

    Only betas from LEAST_BETA are taken, and of them those the samples can judge (effective share LEAST_EFFECTIVE or more; the largest
    beta always counts).
    """
    judged = [b for b in pair.gains if b >= LEAST_BETA and pair.effective[b] >= LEAST_EFFECTIVE] or [max(pair.gains)]
    default = min(judged, key=lambda b: (abs(math.log(b)), -b))
    better = {b: float(g.mean()) for b in judged if (g := pair.gains[b] - pair.gains[default]).mean() > standard_error(g)}
    return max((b for b, gain in better.items() if gain >= max(better.values()) - FLAT), default=default)


def choose_pair(pairs: Sequence[Pair]) -> Pair | None:
    """The last pair (the default), unless another's predicted log-likelihood is higher by more than one standard error of the
    difference, prompt by prompt; then the one with the highest. None without pairs."""
    if not pairs:
        return None
    default = pairs[-1]
    better = [p for p in pairs if (p.predicted - default.predicted).mean() > standard_error(p.predicted - default.predicted)]
    return max(better, key=lambda p: float(p.predicted.mean())) if better else default

"""What a PPO round cost, as metrics: time and tokens a second by phase, padding, and the learners' shares of the update."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from srppo.train.compute import Compute
from srppo.train.learner import Learner, MicroLosses, StepResult


@dataclass
class TimedLearner(Learner):
    """A learner that adds up the seconds of its steps. On a GPU what a step queues last may count for the next one."""

    seconds: float = 0.0

    def step(self, micro_losses: MicroLosses, denominator: int) -> StepResult:
        started = time.perf_counter()
        try:
            return super().step(micro_losses, denominator)
        finally:
            self.seconds += time.perf_counter() - started

    def take_seconds(self) -> float:
        """Since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def snapshot(compute: Compute) -> Compute:
    """Its counts so far, to take the difference from later."""
    copy = Compute()
    copy.add(compute)
    return copy


def rates(responses: int, seconds: Mapping[str, float], collected: Compute, spent: Compute) -> dict[str, float]:
    """Tokens a second and padding of a round.

    responses: its response tokens. seconds: of rollout, score and update. collected, spent: its cost after the rollouts, and in all.
    """
    passed = {"score": spent.forward_tokens - collected.forward_tokens, "update": spent.trained_tokens}
    out = {
        "tokens_per_second": responses / max(sum(seconds.values()), 1e-9),
        "rollout/tokens_per_second": responses / max(seconds["rollout"], 1e-9),
        **{f"{name}/tokens_per_second": tokens / max(seconds[name], 1e-9) for name, tokens in passed.items()},
    }
    share = padding_share(spent.padding_tokens, spent.forward_tokens + spent.trained_tokens)
    return out if share is None else out | {"padding_share": share}


def padding_share(padding: int | None, tokens: int) -> float | None:
    """Of the positions that went through a model, those that held padding; None where padding is not counted."""
    return None if padding is None else padding / max(padding + tokens, 1)

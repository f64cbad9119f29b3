"""The card's table over beta, by hand: two prompts, two samples each, rewards that make the weights simple."""

from __future__ import annotations

import math

import pytest
import torch

from srppo.diagnose.evidence import Responses
from srppo.diagnose.figures import Group, beta_rows
from srppo.records import Rollout
from srppo.rewards import CoherentReward

EOS = 1


def responses(answers: list[list[int]], each: int, rewards: list[float]) -> Responses:
    """Answers that end in EOS; the whole reward at the first token, as log pi_sft - log pi_base."""
    width = max(map(len, answers)) + 1
    ids, mask = torch.zeros(len(answers), width, dtype=torch.int64), torch.zeros(len(answers), width, dtype=torch.bool)
    for row, answer in enumerate(answers):
        full = [*answer, EOS]
        ids[row, : len(full)], mask[row, : len(full)] = torch.tensor(full), True
    prompts = [[row // each + 5] for row in range(len(answers))]
    rollout = Rollout(
        prompts, [row // each for row in range(len(answers))], ids, mask, torch.zeros(mask.shape), torch.ones(len(answers)).bool()
    )
    base = torch.where(mask, -5.0, 0.0)
    sft = base.clone()
    sft[:, 0] += torch.tensor(rewards)
    return Responses(rollout, each, {"sft": sft, "base": base})


def test_beta_rows_by_hand() -> None:
    """Prompt 1: samples "7" (reward log 3) and "8 9" (0), the demonstration "7". Prompt 2: twice reward 0, the demonstration is neither.

    At beta 1 the weights are 3/4, 1/4 and 1/2, 1/2; at beta 1/2 they are 9/10, 1/10. Z with the demonstration among n + 1: gains
    log 3 - log((3 + 3 + 1) / 3) and log 1 - log(3 / 3), the second demonstration's reward being 0 too.
    """
    samples = responses([[7], [8, 9], [7], [8, 9]], 2, [math.log(3), 0.0, 0.0, 0.0])
    demonstrations = responses([[7], [6]], 1, [math.log(3), 0.0])
    group = Group("held-out", [], samples, samples, demonstrations, None)
    one, half = beta_rows(group, CoherentReward(), "sft", [1.0, 0.5])
    assert one.reward == pytest.approx(0.75 * math.log(3) / 2)
    assert one.length == pytest.approx(((0.75 * 2 + 0.25 * 3) + 2.5) / 2)
    assert one.match == pytest.approx(0.75 / 2) and one.match_gain == pytest.approx((0.75 - 0.5) / 2)
    assert half.match == pytest.approx(0.9 / 2) and half.match_gain == pytest.approx((0.9 - 0.5) / 2)
    assert one.gain is not None and one.gain.value == pytest.approx((math.log(3) - math.log(7 / 3)) / 2)
    assert one.effective == pytest.approx(((1 / (0.75**2 + 0.25**2)) / 2 + 1) / 2)
    assert one.kl == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    other = Group("all", [], samples, samples, None, None)
    assert beta_rows(other, CoherentReward(), "sft", [1.0])[0].match_gain is None

"""The training loop's own judge and make_experience on the tabular world: sampled PPO as it is run, against the exact optimum."""

from __future__ import annotations

import pytest
import torch

from srppo.config import build
from srppo.losses.policy import clipped_surrogate
from srppo.losses.value import clipped_value_loss
from srppo.methods.srppo import coherent_reward
from srppo.records import Rollout, ScoredRollout
from srppo.train.experience import ValueScale, judge, make_experience
from test_tabular import ENDED, MASK, PREFIXES, STATE, TOKENS, World, distribution, logprobs, normalised, total_variation

ROWS, ROUNDS = 512, 100


def rounds(world: World, anchor: str, beta: float, placement: str, start: torch.Tensor) -> torch.Tensor:
    """Logits of a policy after ROUNDS rounds; the records, KL, units, whitening and targets are the loop's."""
    config = build({"reward": {"placement": placement, "kl_anchor": anchor, "kl_coef": beta, "missing_eos": "keep"}})
    reward, scale = coherent_reward(config.reward), None
    policy, critic = start.clone().requires_grad_(), torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [policy], "lr": 0.03}, {"params": [critic], "lr": 0.1}])
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / ROUNDS)
    said = {"sft": torch.nan_to_num(logprobs(world.sft)), "base": torch.nan_to_num(logprobs(world.base))}
    g = torch.Generator().manual_seed(0)
    for _ in range(ROUNDS):
        drawn = torch.multinomial(distribution(policy).detach(), ROWS, replacement=True, generator=g)
        mask, state, old = MASK[drawn], STATE[drawn], torch.nan_to_num(logprobs(policy).detach())[drawn]
        rollout = Rollout([[0]] * ROWS, list(range(ROWS)), TOKENS[drawn], mask, old, ENDED[drawn])
        sft, base = said["sft"][drawn], said["base"][drawn]
        scored = ScoredRollout(rollout, sft, base, sft, said[anchor][drawn], critic.detach()[state] * mask)
        judged = judge(scored, reward, beta)
        scale = scale or ValueScale.of(judged.returns)
        experience = make_experience(scored, judged, beta, scale, config)
        for _ in range(4):
            optimizer.zero_grad()
            actor = clipped_surrogate(logprobs(policy)[drawn][mask], experience.old_logprobs[mask], experience.advantages[mask], clip=0.2)
            error = clipped_value_loss(critic[state][mask], experience.old_values[mask], experience.returns[mask], clip=0.5)
            ((actor.loss + error.loss) / mask.sum()).backward()
            optimizer.step()
        decay.step()
    return policy.detach()


@pytest.mark.parametrize("placement", ["eos", "token"])
def test_anchor_sft_ends_at_the_squared_odds(placement: str) -> None:
    world = World()
    base, sft = distribution(world.base), distribution(world.sft)
    policy = distribution(rounds(world, "sft", 1.0, placement, world.sft))
    assert total_variation(sft, normalised(sft * sft / base)) > 0.3
    assert total_variation(policy, normalised(sft * sft / base)) < 0.03


def test_anchor_base_with_beta_one_ends_at_the_sft() -> None:
    world = World(1)
    base, sft = distribution(world.base), distribution(world.sft)
    assert total_variation(base, sft) > 0.15
    assert total_variation(distribution(rounds(world, "base", 1.0, "eos", world.base)), sft) < 0.03

"""From a rollout to the update's input, against values worked out by hand, and the deal of prompts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from srppo.config import build
from srppo.methods.srppo import coherent_reward, first_beta, next_beta
from srppo.records import Rollout, ScoredRollout
from srppo.train.experience import ValueScale, deal_prompts, importance_weights, judge, make_experience, round_metrics
from srppo.train.update import split_rows


def scored(values: torch.Tensor | None = None) -> ScoredRollout:
    """Two rollouts of three and two tokens, the second cut at the limit."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    rollout = Rollout(
        prompt_ids=[[5], [5, 6]],
        prompt_index=[0, 1],
        responses=torch.tensor([[7, 8, 9], [7, 8, 0]]),
        mask=mask,
        behaviour_logprobs=torch.tensor([[-1.0, -1.0, -1.0], [-2.0, -2.0, 0.0]]),
        ended=torch.tensor([True, False]),
    )
    sft = torch.tensor([[-1.0, -2.0, -1.5], [-1.0, -1.0, 0.0]])
    base = torch.tensor([[-3.0, -2.5, -2.0], [-2.0, -0.5, 0.0]])
    return ScoredRollout(rollout, sft, base, sft, sft, torch.zeros(2, 3) if values is None else values)


def test_rewards_kl_and_returns_by_hand() -> None:
    config = build({"reward": {"missing_eos_penalty": 3.0, "kl_coef": 0.5}, "ppo": {"whiten_advantages": False, "gae_lambda": 1.0}})
    judged = judge(scored(), coherent_reward(config.reward), 0.5)
    # log-ratios: 2 + .5 + .5 = 3 ; 1 - .5 - 3 (no EOS) = -2.5.  k1: (-1+1) + (-1+2) + (-1+1.5) = 1.5 ; (-2+1) * 2 = -2
    assert judged.reward.scores.tolist() == pytest.approx([3.0, -2.5])
    assert judged.returns.tolist() == pytest.approx([3.0 - 0.75, -2.5 + 1.0])
    scale = ValueScale(mean=1.0, std=2.0)
    experience = make_experience(scored(), judged, 0.5, scale, config)
    # lambda 1: advantage = reward to go - V, V = 1 everywhere; rewards: [0, -.5, 3-.25], [.5, -2.5+.5]
    assert experience.advantages.tolist() == [pytest.approx([1.25, 1.25, 1.75]), pytest.approx([-2.5, -3.0, 0.0])]
    assert experience.returns.tolist() == [pytest.approx([0.625, 0.625, 0.875]), pytest.approx([-1.25, -1.5, 0.0])]
    metrics = round_metrics(judged, experience, 0.5, scale)
    assert metrics["objective/kl"] == pytest.approx((1.5 - 2.0) / 2)
    assert metrics["objective/rlhf_reward"] == pytest.approx((2.25 - 1.5) / 2)
    assert metrics["completions/clipped_ratio"] == 0.5 and metrics["val/num_eos_tokens"] == 1
    assert metrics["completions/mean_length"] == 2.5 and metrics["reward_length_correlation"] == pytest.approx(1.0)


def test_importance_weights_correct_an_engine_of_other_precision() -> None:
    """E_mu[w f] = E_pi[f] while nothing is cut, and a cut at the cap; through make_experience only where the denominator was recomputed."""
    pi, mu = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.5, 0.1])
    weights, f = importance_weights(pi.log()[None], mu.log()[None], 10.0)[0], torch.tensor([3.0, -1.0, 7.0])
    assert float((mu * weights * f).sum()) == pytest.approx(float((pi * f).sum()), rel=1e-6)
    assert importance_weights(pi.log()[None], mu.log()[None], 1.5)[0].tolist() == pytest.approx([1.25, 0.6, 1.5])
    record = scored()
    old = record.rollout.behaviour_logprobs + torch.tensor([[0.1, 2.0, 0.0], [-0.5, 0.0, 0.0]])
    plain, corrected = (
        make_experience(record, judge(record, coherent_reward(c.reward), 0.5, old), 0.5, ValueScale(), c).advantages
        for c in (build({}), build({"ppo": {"behaviour_logprobs": "recompute", "importance_cap": 3.0}}))
    )
    expected = plain * torch.tensor([[1.1051709, 3.0, 1.0], [0.6065307, 1.0, 1.0]])
    assert plain.abs().min() == 0 and plain[0].abs().min() > 0  # the mask's end alone is zero
    torch.testing.assert_close(corrected, expected)


def test_excluded_rollouts_do_not_shape_the_whitening() -> None:
    config = build({"reward": {"missing_eos": "exclude"}})
    experience = make_experience(scored(), judge(scored(), coherent_reward(config.reward), 1.0), 1.0, ValueScale(), config)
    assert experience.keep.tolist() == [True, False]
    assert float(experience.advantages[0].mean()) == pytest.approx(0.0, abs=1e-6)
    assert experience.advantages[1].tolist() == [0.0, 0.0, 0.0]


def group_of_four(last_reward: float) -> ScoredRollout:
    """Three samples of a prompt with rewards 1, 2 and `last_reward`, the third cut, and one of another prompt; two tokens each.
    The critic foresees the returns of all but the third."""
    mask = torch.ones(4, 2).bool()
    rollout = Rollout(
        [[5]] * 3 + [[6]], [0, 0, 0, 1], torch.full((4, 2), 7), mask, torch.full((4, 2), -1.0), torch.tensor([1, 1, 0, 1]).bool()
    )
    base = torch.full((4, 2), -1.0)
    sft = base.clone()
    sft[:, 0] += torch.tensor([1.0, 2.0, last_reward, 50.0])
    return ScoredRollout(rollout, sft, base, base, None, torch.tensor([[1.0], [2.0], [-30.0], [50.0]]).repeat(1, 2))


def test_excluded_rollouts_shape_neither_baseline_nor_the_critics_units() -> None:
    """RLOO by hand: of the two kept samples each is the other's baseline; one alone has nothing to be compared with."""
    config = build(
        {"reward": {"missing_eos": "exclude"}, "ppo": {"baseline": "group", "samples_per_prompt": 3, "whiten_advantages": False}}
    )
    for last in (0.0, 90.0):
        rollout = group_of_four(last)
        judged = judge(rollout, coherent_reward(config.reward), 0.0)
        assert ValueScale.of(judged.returns[judged.reward.keep]) == ValueScale.of(torch.tensor([1.0, 2.0, 50.0]))
        found = make_experience(rollout, judged, 0.0, ValueScale(), config)
        assert found.advantages[:, 0].tolist() == [-1.0, 1.0, 0.0, 0.0] and found.keep.tolist() == [True, True, False, True]
        assert round_metrics(judged, found, 0.0, ValueScale())["critic/explained_variance"] == pytest.approx(1.0)
    assert ValueScale.of(torch.zeros(0)) == ValueScale()


def test_a_perfect_critic_explains_everything() -> None:
    config = build({"ppo": {"gae_lambda": 1.0}, "reward": {"kl_anchor": "none"}})
    judged = judge(scored(), coherent_reward(config.reward), 0.0)
    right = torch.tensor([[3.0, 3.0, 3.0], [judged.returns[1]] * 3])
    experience = make_experience(scored(right), judged, 0.0, ValueScale(), config)
    assert round_metrics(judged, experience, 0.0, ValueScale())["critic/explained_variance"] == pytest.approx(1.0)


def test_value_scale_of_a_round() -> None:
    scale = ValueScale.of(torch.tensor([1.0, 3.0]))
    assert (scale.mean, scale.std) == (2.0, 1.0)
    assert ValueScale.of(torch.tensor([4.0, 4.0])).std == 1e-3  # equal returns: no division by zero


def test_every_prompt_is_dealt_once_a_pass_whatever_the_round_size() -> None:
    for per_round in (4, 7, 25):
        dealt = [i for round_ in range(1, 71) for i in deal_prompts(10, per_round, 3, round_)]
        for start in range(0, len(dealt) - 10, 10):
            assert sorted(dealt[start : start + 10]) == list(range(10))
    assert deal_prompts(10, 4, 3, 2) == deal_prompts(10, 4, 3, 2) != deal_prompts(10, 4, 4, 2)
    assert max(Counter(deal_prompts(3, 9, 0, 1)).values()) == 3  # more than there are: each equally often


def test_split_rows_keeps_every_row() -> None:
    parts = split_rows(list(range(10)), 4)
    assert sorted(row for part in parts for row in part) == list(range(10)) and {len(p) for p in parts} <= {2, 3}
    assert len(split_rows([1, 2], 4)) == 2


def test_beta_follows_its_target_only_where_asked() -> None:
    fixed = build({"reward": {"kl_coef": 0.7}}).reward
    assert first_beta(fixed) == next_beta(fixed, 0.7, 100.0, 64) == 0.7
    aimed = build({"reward": {"kl_coef": 0.7, "kl_target": 2.0, "kl_horizon": 640}}).reward
    assert next_beta(aimed, 0.7, 100.0, 64) == pytest.approx(0.7 * (1 + 0.2 * 0.1))
    assert next_beta(aimed, 0.7, 1.9, 64) == pytest.approx(0.7 * (1 - 0.05 * 0.1))
    assert first_beta(build({"reward": {"kl_anchor": "none"}}).reward) == 0.0


def test_group_baseline_compares_a_prompts_samples() -> None:
    config = build({"reward": {"kl_anchor": "none"}, "ppo": {"baseline": "group", "samples_per_prompt": 2, "whiten_advantages": False}})
    record = scored()
    record = replace(record, rollout=replace(record.rollout, prompt_index=[0, 0]))
    judged = judge(record, coherent_reward(config.reward), 0.0)
    experience = make_experience(record, judged, 0.0, ValueScale(), config)
    high, low = 3.0, 0.5 - 1.0  # whole returns: 2 + .5 + .5, and 1 - .5 - 1 (the default penalty without EOS)
    assert experience.advantages.tolist() == [pytest.approx([high - low] * 3), pytest.approx([low - high] * 2 + [0.0])]

"""From prompts to what the PPO update consumes: rollout -> score -> place reward -> advantages. Each step returns a new record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from srppo.advantages import generalized_advantages, group_baseline, reward_to_go
from srppo.config import RunConfig
from srppo.masking import masked_mean, masked_sum, masked_whiten, unflatten
from srppo.models.over_rollout import logprobs_and_states, over_rollout, padding_tokens, prefixes, role_logprobs, rollout_tokens, shares
from srppo.models.preference_model import PreferenceModel
from srppo.models.roles import Roles
from srppo.records import Experience, Features, Prompt, Rollout, ScoredRollout
from srppo.rewards import CoherentReward, PreferenceReward, RewardOutput, kl_k1, kl_k3, token_log_ratio
from srppo.rollout.engine import RolloutEngine, Sampling, repeated
from srppo.seeding import permutation
from srppo.train.compute import Compute
from srppo.world import world


def deal_prompts(count: int, per_iteration: int, seed: int, iteration: int) -> list[int]:
    """Indices of the prompts of a 1-based iteration: reshuffled passes over all prompts, a pure function of its arguments."""
    first = (iteration - 1) * per_iteration
    positions = range(first, first + per_iteration)
    orders = {epoch: permutation(count, seed, "prompts", epoch) for epoch in {p // count for p in positions}}
    return [orders[p // count][p % count] for p in positions]


def collect(
    roles: Roles,
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    seed: int,
    iteration: int,
    compute: Compute,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """The policy's responses, `samples` for each prompt. Every row has its own random stream."""
    rows, seeds, index = repeated([p.ids for p in prompts], samples, seed, "rollout", iteration)
    with roles.use("policy") as model:
        rollout = engine.generate(model, rows, seeds, sampling, index, on_progress)
    compute.forward_tokens += rollout_tokens(rollout)
    return rollout


def score(
    roles: Roles,
    rollout: Rollout,
    config: RunConfig,
    compute: Compute,
    check: Callable[[], None] = lambda: None,
    preference_model: PreferenceModel | None = None,
) -> ScoredRollout:
    """The frozen models' log-probabilities, the critic's values and the reward model's scores. A model that serves twice is run once."""
    tokens = config.ppo.micro_batch_tokens
    reward_role = "reward" if roles.has("reward") else "sft"
    needed = {reward_role, "base", "sft"}  # the anchor is one of these
    said, states, values = {}, None, torch.zeros(rollout.mask.shape)
    headed = roles.has_critic and not roles.critic_has_trunk
    below = prefixes(roles, rollout, tokens)
    for role in sorted(needed):
        check()
        if role == "sft" and headed:
            said[role], states = logprobs_and_states(roles, role, rollout, tokens, below)
        else:
            said[role] = role_logprobs(roles, role, rollout, tokens, below)
    check()
    features = None
    if states is not None:
        decided = decided_so_far(said[reward_role], said["base"], rollout, config)
        features = Features(states, [decided[row, :n] for row, n in enumerate(rollout.lengths.tolist())])
        mine = shares(rollout)[world().rank]
        values[mine] = unflatten(roles.values_of(features, mine).cpu(), rollout.mask[mine])
        world().sum_(values)
    elif roles.has_critic:
        values = over_rollout(roles, rollout, tokens, roles.values, below)
    preference = None
    if preference_model is not None:
        check()
        preference = preference_model.scores(rollout, tokens)
    models = len(needed) + (roles.has_critic and not headed) + (preference_model is not None)
    compute.forward_tokens += models * rollout_tokens(rollout)
    compute.padding_tokens += models * padding_tokens(roles, rollout, tokens)
    return ScoredRollout(
        rollout, said[reward_role], said["base"], said["sft"], said.get(config.reward.kl_anchor), values, preference, features, below
    )


def decided_so_far(lp_reward: Tensor, lp_base: Tensor, rollout: Rollout, config: RunConfig) -> Tensor:
    """[B, T] the sum of the coherent reward's terms (clip and shift inside, not divided by the length) of the tokens before each."""
    reward = config.reward
    clip, shift = reward.token_clip, reward.token_shift
    terms = token_log_ratio(
        lp_reward, lp_base, rollout.mask, rollout.ended, include_eos=reward.include_eos, token_clip=clip, token_shift=shift
    )
    return F.pad(terms.cumsum(1)[:, :-1], (1, 0)) if terms.shape[1] else terms


@dataclass(frozen=True)
class ValueScale:
    """The critic's units (ours): V = mean + std * critic, from the first round's returns and fixed after it.

    Log-ratios run to tens of nats, and their size is known only once rollouts are scored. In raw units a fresh critic with a small
    learning rate and a value clip of 0.2 would need hundreds of rounds to reach the mean; in these it starts there.
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, returns: Tensor) -> ValueScale:
        """From the whole returns of a round's rollouts that the loss keeps [B]; those of mean 0 and std 1 where there is none."""
        if not len(returns):
            return cls()
        return cls(float(returns.mean()), max(float(returns.std(unbiased=False)), 1e-3))


@dataclass(frozen=True)
class Judged:
    """A scored rollout's rewards before credit is assigned."""

    reward: RewardOutput
    kl: Tensor  # [B, T] k1 terms to the anchor, zero without one
    kl_sft: Tensor  # [B, T] k1 terms to the SFT model, whatever the anchor
    kl_k3: Tensor  # [B, T] k3 terms to the SFT model
    old_logprobs: Tensor  # [B, T] the ratio's denominator
    returns: Tensor  # [B] score - beta * KL of the whole response


def reward_of(scored: ScoredRollout, reward: CoherentReward | PreferenceReward) -> RewardOutput:
    """What the reward gives for a scored rollout."""
    mask, ended = scored.rollout.mask, scored.rollout.ended
    if isinstance(reward, CoherentReward):
        return reward(scored.lp_reward, scored.lp_base, mask, ended)
    assert scored.preference is not None, "scored without the reward model"
    return reward(scored.preference, scored.lp_reward - scored.lp_base, mask, ended)


def judge(scored: ScoredRollout, reward: CoherentReward | PreferenceReward, beta: float, old_logprobs: Tensor | None = None) -> Judged:
    """Place the reward and measure the KL. old_logprobs [B, T]: the ratio's denominator; the engine's word by default."""
    mask = scored.rollout.mask
    old = scored.rollout.behaviour_logprobs if old_logprobs is None else old_logprobs
    given = reward_of(scored, reward)
    kl = torch.zeros_like(old) if scored.lp_anchor is None else kl_k1(old, scored.lp_anchor, mask)
    returns = masked_sum(given.token_rewards - beta * kl, mask, 1)
    return Judged(given, kl, kl_k1(old, scored.lp_sft, mask), kl_k3(old, scored.lp_sft, mask), old, returns)


def make_experience(scored: ScoredRollout, judged: Judged, beta: float, scale: ValueScale, config: RunConfig) -> Experience:
    """KL penalty subtracted token by token (k1), advantages whitened; old_values and returns in the critic's units.

    ppo.baseline "critic": advantages by GAE. "group": reward-to-go minus the mean whole return of the prompt's other kept samples
    (RLOO, Ahmadian et al. 2024, arXiv 2402.14740), lambda and the critic play no part.
    Where the ratio's denominator was recomputed, advantages are weighted by importance_weights.
    """
    rollout, ppo, mask = scored.rollout, config.ppo, scored.rollout.mask
    values = torch.where(mask, scale.mean + scale.std * scored.values, 0.0)
    rewards = judged.reward.token_rewards - beta * judged.kl
    if ppo.baseline == "group":
        returns = reward_to_go(rewards, mask, ppo.gamma)
        others = kept_baseline(judged, rollout.prompt_index)[:, None]
        advantages = torch.where(mask & ~others.isnan(), returns - others, 0.0)  # a sample without a rival teaches nothing
    else:
        advantages, returns = generalized_advantages(rewards, values, mask, ppo.gamma, ppo.gae_lambda)
    if ppo.whiten_advantages:
        advantages = masked_whiten(advantages, mask & judged.reward.keep[:, None])
    if ppo.behaviour_logprobs == "recompute" and ppo.importance_cap is not None:
        advantages = advantages * importance_weights(judged.old_logprobs, rollout.behaviour_logprobs, ppo.importance_cap)
    targets = torch.where(mask, (returns - scale.mean) / scale.std, 0.0)
    return Experience(
        rollout, judged.old_logprobs, scored.values, advantages, targets, judged.reward.keep, scored.features, scored.prefixes
    )


def importance_weights(trainer_logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / mu, cap) a token: truncated importance sampling of responses drawn by an engine whose probabilities mu differ from
    the trainer's pi_old for the same weights (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; Ionides 2008 for the truncation).

    All [B, T]; where both are equal, as off the mask, the weight is 1.
    """
    return (trainer_logprobs - engine_logprobs).exp().clamp(max=cap)


def kept_baseline(judged: Judged, prompt_index: Sequence[int]) -> Tensor:
    """[B] mean return of the prompt's other samples, of those alone that the loss keeps; NaN where there is nothing to compare with."""
    keep = judged.reward.keep
    out = torch.full_like(judged.returns, math.nan)
    index = [i for i, kept in zip(prompt_index, keep.tolist()) if kept]
    if index:
        count = Counter(index)
        alone = torch.tensor([count[i] == 1 for i in index])
        others = group_baseline(judged.returns[keep], index, leave_one_out=True)
        out[keep] = torch.where(alone, math.nan, others)
    return out


def round_metrics(judged: Judged, experience: Experience, beta: float, scale: ValueScale) -> dict[str, float]:
    """Metrics of a round's rollouts, under TRL's names where TRL has one. docs/metrics.md defines each."""
    rollout, mask, given = experience.rollout, experience.rollout.mask, judged.reward
    lengths, kl_sums = rollout.lengths.float(), masked_sum(judged.kl, mask, 1)
    spread = torch.stack([given.scores, lengths])
    varied = bool((spread.std(1, unbiased=False) > 0).all())
    kept = mask & given.keep[:, None]
    residual = masked_variance(experience.returns - experience.old_values, kept)
    spread_returns = masked_variance(experience.returns, kept)
    out = {
        "objective/kl": kl_sums.mean(),
        "objective/kl_sft": masked_sum(judged.kl_sft, mask, 1).mean(),
        "objective/kl_sft_k3": masked_sum(judged.kl_k3, mask, 1).mean(),
        "objective/scores": given.scores.mean(),
        "objective/scores_std": given.scores.std(unbiased=False),
        "objective/non_score_reward": (-beta * kl_sums).mean(),
        "objective/rlhf_reward": (given.scores - beta * kl_sums).mean(),
        "objective/entropy": masked_sum(-experience.old_logprobs, mask, 1).mean(),
        "objective/log_ratio_per_token": masked_mean(given.log_ratio, mask),
        "objective/negative_token_share": masked_mean((given.log_ratio < 0).float(), mask),
        "completions/mean_length": lengths.mean(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~rollout.ended).float().mean(),
        "completions/excluded": (~given.keep).float().sum(),
        "val/num_eos_tokens": rollout.ended.float().sum(),
        "reward_length_correlation": torch.corrcoef(spread)[0, 1] if varied else torch.zeros(()),
        "critic/explained_variance": 1 - residual / spread_returns if spread_returns > 0 else torch.zeros(()),
        "critic/mean_value": scale.mean + scale.std * masked_mean(experience.old_values, mask),
    }
    return {name: float(value) for name, value in out.items()}


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance over the masked entries."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

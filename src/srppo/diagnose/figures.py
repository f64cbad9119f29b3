"""The figures of the reward card, from scored responses to records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from srppo.diagnose.evidence import Responses
from srppo.diagnose.reward_card import BetaRow, LengthBias, Preference, RewardSpread
from srppo.diagnose.statistics import (
    Floats,
    buckets,
    effective_share,
    estimate,
    likelihood_gain,
    margin,
    preference,
    slope,
    spearman,
    tempered_weights,
    weights_kl,
    within,
)
from srppo.records import Prompt
from srppo.rewards import CoherentReward, last_token

TOP_TOKENS = 3


@dataclass(frozen=True)
class Group:
    """A group of P prompts with the start's and the base's responses."""

    name: str
    prompts: list[Prompt]
    samples: Responses  # of the start
    base: Responses
    demonstrations: Responses | None  # of the held-out group
    scores: Floats | None  # [P, n] of the user's scoring function on the samples, where it fits the prompts


def preferences(reward: CoherentReward, numerator: str, demonstrations: Responses, against: Mapping[str, Responses]) -> list[Preference]:
    """AUC and margin of the held-out demonstrations against each author's samples, over all and by the demonstrations' lengths."""
    theirs = demonstrations.rewards(reward, numerator)[:, 0]
    sizes = buckets(demonstrations.rollout.lengths.tolist())
    out = []
    for author, samples in against.items():
        rewards, same = samples.rewards(reward, numerator), samples.same_as(demonstrations)
        ranks, margins = preference(theirs, rewards, same), margin(theirs, rewards, same)
        for name, which in [("all", np.ones(len(theirs), dtype=bool)), *sizes]:
            out.append(Preference(author, name, estimate(ranks[which]), estimate(margins[which])))
    return out


def length_bias(groups: Sequence[Group], reward: CoherentReward, numerator: str) -> LengthBias:
    """Reward against length, and where in the responses the reward sits, over the start's samples of all groups."""
    responses = [g.samples for g in groups]
    rewards = [r.rewards(reward, numerator) for r in responses]
    lengths = [r.lengths for r in responses]
    every_reward, every_length = (np.concatenate([x.ravel() for x in tables] or [np.zeros(0)]) for tables in (rewards, lengths))
    inner_reward, inner_length = (np.concatenate([within(x) for x in tables] or [np.zeros(0)]) for tables in (rewards, lengths))
    size = eos = top = negative = tokens = 0.0
    for r in responses:
        terms, mask = r.log_ratio(numerator), r.rollout.mask
        absolute = terms.abs()
        size += float(absolute.sum())
        eos += float(absolute[last_token(mask) & r.rollout.ended[:, None]].sum()) if reward.include_eos else 0.0
        top += float(absolute.topk(min(TOP_TOKENS, absolute.shape[1]), dim=1).values.sum())
        negative += float((terms[mask] < 0).sum())
        tokens += float(mask.sum())
    return LengthBias(
        spearman(every_length, every_reward),
        slope(every_length, every_reward),
        spearman(inner_length, inner_reward),
        eos / max(size, 1e-12),
        top / max(size, 1e-12),
        negative / max(tokens, 1.0),
    )


def beta_rows(group: Group, reward: CoherentReward, numerator: str, betas: Sequence[float]) -> list[BetaRow]:
    """What each KL coefficient would move the group's responses towards."""
    rewards, lengths = group.samples.rewards(reward, numerator), group.samples.lengths
    held = group.demonstrations
    same = group.samples.same_as(held).astype(float) if held else None
    out = []
    for beta in betas:
        weights = tempered_weights(rewards, beta)
        accuracy = None if group.scores is None else (weights * group.scores).sum(1)
        out.append(
            BetaRow(
                beta,
                group.name,
                float(effective_share(weights).mean()),
                float(weights_kl(weights).mean()),
                float((weights * rewards).sum(1).mean()),
                float((weights * lengths).sum(1).mean()),
                None if same is None else float((weights * same).sum(1).mean()),
                None if held is None else estimate(likelihood_gain(held.rewards(reward, numerator)[:, 0], rewards, beta)),
                None if accuracy is None else estimate(accuracy),
                None if accuracy is None or group.scores is None else estimate(accuracy - group.scores.mean(1)),
                match_gain=None if same is None else float((weights * same).sum(1).mean() - same.mean()),
            )
        )
    return out


def spread(group: Group, author: str, reward: CoherentReward, numerator: str) -> RewardSpread:
    """The reward's distribution over the start's ("sft") or the base's samples."""
    responses = group.samples if author == "sft" else group.base
    rewards = responses.rewards(reward, numerator)
    return RewardSpread(
        author,
        group.name,
        float(rewards.mean()),
        float(rewards.std()),
        [float(q) for q in np.quantile(rewards, [0.05, 0.25, 0.5, 0.75, 0.95])],
        float(responses.lengths.mean()),
        float(responses.ended.mean()),
        rewards.size,
    )

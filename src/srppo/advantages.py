"""Advantages and returns from token rewards. All tensors [B, T], padding at the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 11-16).

        delta_t  = r_t + gamma V_{t+1} - V_t
        A_t      = delta_t + gamma lam A_{t+1}
        return_t = A_t + V_t                     (the critic's target)

    with V and A zero past the last response token: a response ends there, with an EOS or at the length limit.

    rewards, values [B, T]; mask [B, T], true on response tokens incl. EOS, false on padding at the right.
    Returns (advantages, returns), [B, T], zero where mask is; neither carries a gradient. What stands off the mask is never read.
    """
    keep = mask.bool()
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    reward, value = torch.where(keep, rewards, zero).detach(), torch.where(keep, values, zero).detach()
    advantages = torch.zeros_like(value)
    next_value = next_advantage = torch.zeros_like(value[:, :1].sum(1))  # [B]
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = value[:, t]
        advantages[:, t] = next_advantage
    # Right of the last token rewards and values are 0, so the recursion brings exactly 0 to it: no masking inside the loop.
    return torch.where(keep, advantages, zero), torch.where(keep, advantages + value, zero)


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, [B, T], zero off the mask: the GAE of values 0 and lambda 1."""
    return generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]


def group_baseline(scores: Tensor, groups: Sequence[int] | Tensor, leave_one_out: bool = False) -> Tensor:
    """Mean score of each row's group (the samples of one prompt), [B], to subtract from the scores.

    scores [B]; groups: B group numbers. leave_one_out takes the mean of the other members only, so that the baseline does not depend
    on the row's own sample (RLOO, Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE; Ahmadian et al. 2024, arXiv 2402.14740);
    a row alone in its group then has baseline 0, there being nothing to compare with.
    """
    number = torch.as_tensor(groups, device=scores.device)
    assert number.shape == scores.shape, f"{tuple(number.shape)} groups for {tuple(scores.shape)} scores"
    index, count = torch.unique(number, return_inverse=True, return_counts=True)[1:]
    total = torch.zeros(len(count), dtype=scores.dtype, device=scores.device).index_add_(0, index, scores)[index]
    size = count[index].to(scores.dtype)
    if not leave_one_out:
        return total / size
    return torch.where(size > 1, (total - scores) / (size - 1).clamp(min=1), torch.zeros_like(scores))

"""The coherent reward of Self-Rewarding PPO, a reward model's in its place, and the KL terms beside them.

Coherent reward (SRPPO, arXiv 2510.21090; from CSIL, Watson et al. 2023, arXiv 2305.16498):
    r(x, y) = log pi_sft(y|x) - log pi_base(y|x) = sum_t [lp_sft(y_t) - lp_base(y_t)]
All tensors are [B, T]; mask is true on response tokens incl. EOS. Nothing off the mask, NaN and infinity included, reaches a result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from srppo.masking import masked_mean

Placement = Literal["eos", "token"]
LengthNormalization = Literal["none", "mean"]
MissingEos = Literal["penalty", "exclude", "keep"]


def last_token(mask: Tensor) -> Tensor:
    """[B, T] bool: true at the last response token of each row, nowhere in an empty row."""
    mask = mask.bool()
    still_to_come = mask.flip(1).cumsum(1).flip(1)  # masked tokens from here on
    return mask & (still_to_come == 1)


def token_log_ratio(
    lp_reward: Tensor,
    lp_base: Tensor,
    mask: Tensor,
    ended: Tensor,
    *,
    include_eos: bool = True,
    token_clip: float | None = None,
    token_shift: float = 0.0,
) -> Tensor:
    """clip(lp_reward - lp_base, -token_clip, token_clip) - token_shift at each token that counts, 0 elsewhere.

    lp_reward, lp_base, mask [B, T]; ended [B] bool, true where the row's last token is an EOS. Returns [B, T], nats.
    include_eos=False takes the EOS token out: neither its log-ratio nor a shift. (A row cut at the limit has no EOS: all its tokens count.)
    The clip comes before the shift, so token_shift = token_clip makes every term <= 0, the non-positive form of CSIL.
    """
    counts = mask.bool()
    if not include_eos:
        counts = counts & ~(last_token(mask) & ended.bool().unsqueeze(1))
    ratio = lp_reward - lp_base
    if token_clip is not None:
        ratio = ratio.clamp(-token_clip, token_clip)
    return torch.where(counts, ratio - token_shift, torch.zeros_like(ratio))


@dataclass(frozen=True)
class RewardOutput:
    """What the reward gives for B rollouts."""

    scores: Tensor  # [B] reward of the whole response, missing-EOS penalty included, before whitening
    token_rewards: Tensor  # [B, T] the same placed on tokens (and whitened if asked), 0 off the mask
    keep: Tensor  # [B] bool, False for rollouts the loss leaves out: missing EOS under "exclude", and empty responses
    log_ratio: Tensor  # [B, T] lp_reward - lp_base as the models say it: no clip, no shift, EOS included; 0 off the mask


@dataclass(frozen=True)
class CoherentReward:
    """The reward with all its options (field names as in the `reward` section of the configuration).

    With u_t = token_log_ratio (clip, shift and EOS options inside), n the number of response tokens incl. EOS, and
    w_t = scale (length_normalization "none") or scale / n ("mean"):

        score = sum_t w_t u_t - missing_eos_penalty [no EOS]
        placement "token":  reward_t = w_t u_t, the penalty at the last token
        placement "eos":    reward_t = score at the last token, 0 before

    so that the token rewards of a row sum to its score in both, and at gamma = 1 both have the same return.
    The penalty is neither scaled nor divided by n. missing_eos "exclude" and "keep" subtract nothing.
    whiten divides every token reward by the standard deviation of the kept rows' scores, with no shift (the sign has meaning).
    The divisor is the scores' in both placements, so that placements stay comparable and beta means the same in both.
    An empty response (no masked token) has reward 0 and is not kept.

    Raises ValueError for a placement, length_normalization or missing_eos it does not know.
    """

    placement: Placement = "eos"
    length_normalization: LengthNormalization = "none"
    scale: float = 1.0
    token_shift: float = 0.0
    token_clip: float | None = None
    include_eos: bool = True
    missing_eos: MissingEos = "penalty"
    missing_eos_penalty: float = 1.0
    whiten: bool = False

    def __post_init__(self) -> None:
        choices = {"placement": Placement, "length_normalization": LengthNormalization, "missing_eos": MissingEos}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def __call__(self, lp_reward: Tensor, lp_base: Tensor, mask: Tensor, ended: Tensor) -> RewardOutput:
        """lp_reward, lp_base, mask [B, T]; ended [B]. See RewardOutput for the results."""
        mask, ended = mask.bool(), ended.bool()
        last, filled = last_token(mask), mask.any(1)
        terms = self.scale * token_log_ratio(
            lp_reward, lp_base, mask, ended, include_eos=self.include_eos, token_clip=self.token_clip, token_shift=self.token_shift
        )
        if self.length_normalization == "mean":
            terms = terms / mask.sum(1, keepdim=True).clamp(min=1)
        fine = _fine(self.missing_eos, self.missing_eos_penalty, filled, ended).to(terms.dtype)
        scores = terms.sum(1) - fine
        if self.placement == "token":
            rewards = terms - torch.where(last, fine.unsqueeze(1), 0.0)
        else:
            rewards = torch.where(last, scores.unsqueeze(1), 0.0)
        keep = filled & ended if self.missing_eos == "exclude" else filled
        if self.whiten:
            rewards = rewards * _inverse_deviation(scores, keep)
        log_ratio = torch.where(mask, lp_reward - lp_base, torch.zeros_like(terms))
        return RewardOutput(scores, rewards, keep, log_ratio)


@dataclass(frozen=True)
class PreferenceReward:
    """A reward model's score of the whole response, at its last token (PPO of Ouyang et al. 2022, arXiv 2203.02155, section 3.5):

        score = scale * f(x, y) - missing_eos_penalty [no EOS]

    missing_eos and whiten as in CoherentReward; an empty response has reward 0 and is not kept. Raises ValueError as that does.
    """

    scale: float = 1.0
    missing_eos: MissingEos = "penalty"
    missing_eos_penalty: float = 1.0
    whiten: bool = False

    def __post_init__(self) -> None:
        if self.missing_eos not in get_args(MissingEos):
            raise ValueError(f"missing_eos is one of {', '.join(get_args(MissingEos))}, got {self.missing_eos!r}")

    def __call__(self, preference: Tensor, log_ratio: Tensor, mask: Tensor, ended: Tensor) -> RewardOutput:
        """preference [B]: f(x, y); log_ratio [B, T]: log pi_sft - log pi_base, passed through for the metrics; mask [B, T]; ended [B]."""
        mask, ended = mask.bool(), ended.bool()
        filled = mask.any(1)
        fine = _fine(self.missing_eos, self.missing_eos_penalty, filled, ended)
        scores = torch.where(filled, self.scale * preference - fine, 0.0)
        rewards = torch.where(last_token(mask), scores.unsqueeze(1), 0.0)
        keep = filled & ended if self.missing_eos == "exclude" else filled
        if self.whiten:
            rewards = rewards * _inverse_deviation(scores, keep)
        return RewardOutput(scores, rewards, keep, torch.where(mask, log_ratio, torch.zeros_like(log_ratio)))


def _fine(missing_eos: MissingEos, penalty: float, filled: Tensor, ended: Tensor) -> Tensor:
    """[B] what a response without its EOS loses."""
    return torch.where(~ended & filled, penalty if missing_eos == "penalty" else 0.0, 0.0)


def _inverse_deviation(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """1 / std over the masked entries; 1 where there is no spread to divide by. The factor of masked_whiten, as a scalar."""
    variance = masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return torch.where(variance > eps, (variance + eps).rsqrt(), torch.ones_like(variance))


def kl_k1(lp_policy: Tensor, lp_anchor: Tensor, mask: Tensor) -> Tensor:
    """log pi - log pi_anchor of tokens sampled from pi: unbiased for KL(pi || anchor), of either sign, the estimator for rewards.

    [B, T] each, result 0 off the mask. (Schulman 2020, http://joschu.net/blog/kl-approx.html, k1.)
    """
    return torch.where(mask.bool(), lp_policy - lp_anchor, torch.zeros_like(lp_policy))


def kl_k3(lp_policy: Tensor, lp_anchor: Tensor, mask: Tensor) -> Tensor:
    """q - 1 - log q with q = pi_anchor / pi: unbiased for KL(pi || anchor), never negative, the estimator for reports.

    [B, T] each, result 0 off the mask. (Schulman 2020, http://joschu.net/blog/kl-approx.html, k3.)
    """
    log_q = -kl_k1(lp_policy, lp_anchor, mask)  # 0 off the mask, where the result is then 0 too
    return torch.expm1(log_q) - log_q


@dataclass(frozen=True)
class AdaptiveKL:
    """The KL coefficient steered to a target (Ziegler et al. 2019, arXiv 1909.08593, their proportional controller):

        e = clip((kl - target) / target, -0.2, 0.2)
        coef <- coef (1 + e episodes / horizon)

    kl and target in nats a response; episodes: rollouts the KL was measured on; horizon in episodes (their K_beta per batch is
    episodes / horizon). Ours: episodes / horizon is capped at 1, because past 5 their rule would turn the coefficient negative.
    """

    coef: float
    target: float
    horizon: int = 1000

    def updated(self, kl: float, episodes: int) -> AdaptiveKL:
        """The controller after a measurement. A NaN KL tells nothing and changes nothing."""
        if math.isnan(kl):
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coef=self.coef * (1 + error * min(episodes / self.horizon, 1.0)))

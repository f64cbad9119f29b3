"""Actor losses on flat response tokens [N]. Sums, not means: the step divides once by the global token count."""

from __future__ import annotations

import torch
from torch import Tensor

from srppo.records import LossOutput


def clipped_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> LossOutput:
    """PPO's clipped objective, negated and summed (Schulman et al. 2017, arXiv 1707.06347, eq. 7):

        rho_t = exp(lp_t - old_t)
        loss  = sum_t max(-A_t rho_t, -A_t clamp(rho_t, 1 - clip, 1 + clip))

    logprobs, old_logprobs, advantages [N]; gradients flow to logprobs alone. Metric sums over the N tokens:
    approxkl 0.5 (lp - old)^2 (TRL's policy/approxkl), approxkl_k3 rho - 1 - log rho (an unbiased estimate of KL(old || new) from old's
    samples), clipfrac (tokens where the clipped term is the larger, so the gradient is zero), ratio.
    """
    log_ratio = logprobs - old_logprobs.detach()
    ratio = log_ratio.exp()
    weight = -advantages.detach()
    free, clipped = weight * ratio, weight * ratio.clamp(1 - clip, 1 + clip)
    moved, rho = log_ratio.detach(), ratio.detach()
    metrics = {
        "approxkl": (0.5 * moved**2).sum(),
        "approxkl_k3": (torch.expm1(moved) - moved).sum(),
        "clipfrac": (clipped > free).to(moved.dtype).sum(),
        "ratio": rho.sum(),
    }
    return LossOutput(torch.maximum(free, clipped).sum(), metrics)

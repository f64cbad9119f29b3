"""Critic losses on flat response tokens [N]. Sums, not means: the step divides once by the global token count."""

from __future__ import annotations

import torch
from torch import Tensor

from srppo.records import LossOutput


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> LossOutput:
    """Squared error with the change since the rollout clipped (from OpenAI's baselines; described in Huang et al. 2024, arXiv 2403.17031):

        near = old_V + clamp(V - old_V, -clip, clip)
        loss = sum_t 0.5 max((V_t - R_t)^2, (near_t - R_t)^2)

    values, old_values, returns [N]; gradients flow to values alone. clip is in units of the value.
    Metric sums over the N tokens: clipfrac (tokens where the clipped term is the larger, so the gradient is zero), error (V - R)^2.
    """
    old, target = old_values.detach(), returns.detach()
    near = old + (values - old).clamp(-clip, clip)
    free, clipped = (values - target) ** 2, (near - target) ** 2
    metrics = {"clipfrac": (clipped > free).to(free.dtype).sum(), "error": free.detach().sum()}
    return LossOutput(0.5 * torch.maximum(free, clipped).sum(), metrics)

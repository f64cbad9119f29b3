"""Supervised losses on the flat target tokens [N] of demonstrations. Sums, not means: the step divides once by the global token count."""

from __future__ import annotations

from torch import Tensor

from srppo.records import LossOutput


def cross_entropy(logprobs: Tensor) -> LossOutput:
    """SFT's loss, - sum_t log pi(y_t). logprobs [N]: log-probabilities of the demonstrated tokens. No metrics: the loss says it all."""
    return LossOutput(-logprobs.sum(), {})

"""Losses as pure functions: flat [N] tensors of tokens in, sums out."""

from srppo.losses.policy import clipped_surrogate
from srppo.losses.supervised import cross_entropy
from srppo.losses.value import clipped_value_loss

__all__ = ["clipped_surrogate", "clipped_value_loss", "cross_entropy"]

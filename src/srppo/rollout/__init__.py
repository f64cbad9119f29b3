"""Sampling responses: the engine's protocol, and the engine that needs nothing but PyTorch."""

from srppo.rollout.engine import RolloutEngine, Sampling, bias_warning, mismatch
from srppo.rollout.torch_engine import TorchEngine

__all__ = ["RolloutEngine", "Sampling", "TorchEngine", "bias_warning", "mismatch"]

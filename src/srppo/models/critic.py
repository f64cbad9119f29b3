"""The critic: a linear value head on the hidden states of a trunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from srppo.models.forward import autocasting, target_states
from srppo.records import TokenBatch


def value_head(width: int, device: torch.device) -> nn.Linear:
    """Linear(H, 1) in float32, all zeros: an untrained critic values every state at exactly 0."""
    head = nn.Linear(width, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def token_values(trunk: PreTrainedModel, head: nn.Linear, batch: TokenBatch, *, autocast: str = "none") -> Tensor:
    """[N] float32: for each target token the value of the state that predicts it (the state before the token is chosen)."""
    batch = batch.to(trunk.device)
    with autocasting(trunk.device, autocast):
        states = target_states(trunk, batch)
    return head(states.float()).squeeze(-1).clone()  # no view: FSDP2's hook on the result would be lost by a change in place

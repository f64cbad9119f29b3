"""A model's word on every response token of a rollout, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from srppo.masking import length_sorted_chunks, rollout_batch, unflatten
from srppo.models.roles import Roles
from srppo.records import Rollout, TokenBatch


def rollout_tokens(rollout: Rollout) -> int:
    """Prompt and response tokens of all rows: what one pass over the rollout costs."""
    return sum(len(p) for p in rollout.prompt_ids) + int(rollout.mask.sum())


def over_rollout(roles: Roles, rollout: Rollout, rows: int, word: Callable[[TokenBatch], Tensor]) -> Tensor:
    """[B, T] float32 on the CPU, zero off the mask, of a function TokenBatch -> [N] (one value a target token).

    rows: sequences in memory at once; they are grouped by length, so padding is small. No gradient is kept.
    """
    out = torch.zeros(rollout.mask.shape)
    lengths = [len(p) + n for p, n in zip(rollout.prompt_ids, rollout.lengths.tolist())]
    for chunk in length_sorted_chunks(lengths, rows):
        values = word(rollout_batch(rollout, chunk, roles.special.pad_id).to(roles.device)).detach().float().cpu()
        out[chunk] = unflatten(values, rollout.mask[chunk])
    return out


def role_logprobs(roles: Roles, role: str, rollout: Rollout, rows: int) -> Tensor:
    """[B, T] log-probability of each response token under a role."""
    return over_rollout(roles, rollout, rows, lambda batch: roles.score(role, batch).logprobs)

"""Masked reductions, the flat <-> padded views, and the project's only shift by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srppo.records import Example, Rollout, TokenBatch, pad_sequences


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of x where mask is true. x, mask: same shape. A NaN off the mask does not spread."""
    kept = torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask is true; 0 where nothing is."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / std over the masked entries (population variance), 0 off the mask.

    shift_mean=False keeps the mean and only rescales (used on rewards, whose sign has meaning).
    Fewer than two entries, or all equal: the result is x - mean (or x), finite.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    scale = torch.where(variance > eps, (variance + eps).rsqrt(), torch.ones_like(variance))
    white = (x - mean) * scale if shift_mean else x * scale
    return torch.where(mask.bool(), white, torch.zeros((), dtype=x.dtype, device=x.device))


def predicting(states: Tensor, target_mask: Tensor) -> Tensor:
    """The states that predict the target tokens: the project's only shift by one.

    states [B, L, ...], target_mask [B, L] bool with column 0 False. Row-major [N, ...]:
    for each target token at position l, the state at position l - 1.
    """
    return states[:, :-1][target_mask[:, 1:]]


def target_ids(batch: TokenBatch) -> Tensor:
    """[N] ids of the target tokens, in the order of `predicting`."""
    return batch.ids[batch.target_mask]


def unflatten(flat: Tensor, mask: Tensor) -> Tensor:
    """[N] values into [B, T], zeros off the mask (mask [B, T] bool with N true entries, row-major)."""
    out = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
    out[mask] = flat
    return out


def example_batch(examples: Sequence[Example], pad_id: int) -> TokenBatch:
    """Demonstrations as one right-padded batch."""
    ids = pad_sequences([e.ids for e in examples], pad_id)
    attention = pad_sequences([[1] * len(e.ids) for e in examples])
    targets = pad_sequences([e.target_mask for e in examples]).bool()
    targets[:, 0] = False  # the first token of a sequence is predicted by nothing
    return TokenBatch(ids, attention, targets)


def rollout_batch(rollout: Rollout, rows: Sequence[int], pad_id: int) -> TokenBatch:
    """Rows of a rollout as one right-padded batch of prompt + response, targets = response tokens."""
    responses = {r: rollout.response_ids(r) for r in rows}
    prompts = {r: rollout.prompt_ids[r] for r in rows}
    ids = pad_sequences([prompts[r] + responses[r] for r in rows], pad_id)
    attention = pad_sequences([[1] * (len(prompts[r]) + len(responses[r])) for r in rows])
    targets = pad_sequences([[0] * len(prompts[r]) + [1] * len(responses[r]) for r in rows]).bool()
    return TokenBatch(ids, attention, targets)


def token_chunks(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Row indices cut into chunks of rows of like length, longest first (a too large chunk shows at once).

    A chunk holds at most so many tokens, padding included; a row that is longer is alone.
    """
    chunks: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        if not chunks or lengths[chunks[-1][0]] * (len(chunks[-1]) + 1) > tokens:
            chunks.append([])
        chunks[-1].append(row)
    return chunks

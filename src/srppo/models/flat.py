"""A batch as one flat row of tokens: no padding, and nothing after the last token that predicts a target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srppo.models.attention import Layout, layout_of
from srppo.records import TokenBatch


@dataclass(frozen=True)
class FlatRow:
    """The tokens of a batch one example after the other, in row-major order."""

    ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64, from 0 in each example
    layout: Layout
    predicting: Tensor  # [N] int64, the place in the row of the token before each target


def flat_row(batch: TokenBatch) -> FlatRow:
    """The batch's examples, packed or not, cut after the last token that predicts a target.

    What follows that token influences nothing that is asked for: attention is causal. Examples without targets are left out.
    """
    real, targets = batch.attention_mask.bool(), batch.target_mask
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    starts = (positions == 0) & real
    example = (starts.flatten().cumsum(0) - 1).view_as(starts)  # [B, L]; of padding, the example before it
    place = torch.where(targets, positions, 0)
    lengths = torch.zeros(int(starts.sum()), dtype=torch.int64, device=batch.ids.device)
    lengths.scatter_reduce_(0, example[real], place[real], "amax")  # [examples] = position of the last target
    kept = real & (positions < lengths[example])
    offsets = lengths.cumsum(0) - lengths
    predicting = offsets[example[targets]] + positions[targets] - 1
    return FlatRow(batch.ids[kept], positions[kept], layout_of(lengths[lengths > 0]), predicting)

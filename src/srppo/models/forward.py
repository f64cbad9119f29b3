"""Running a model on a batch: hidden states, and log-probabilities of the target tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srppo.logprobs import chunked_logprobs, token_logprobs
from srppo.masking import predicting, target_ids
from srppo.models.plan import head_of, plan, run_logits, run_trunk
from srppo.records import TokenBatch, TokenScores

_Run = Callable[[PreTrainedModel, Tensor, Tensor | None], Tensor]


def trunk_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[B, L, H] states that enter the LM head (final norm applied), on the model's device. What stands on padding means nothing.

    model: a causal language model, or its bare trunk. Rows are right-padded, so no token sees padding, and no padding mask
    is passed: attention then takes its fast causal path. Packed rows (batch.segment_ids) are told apart by position ids
    where the architecture supports it, else run one example a row; the result is the same.
    """
    return _run(run_trunk, model, batch.to(model.device))


def token_scores(
    model: PreTrainedModel, batch: TokenBatch, *, entropy: bool = False, chunk: int = 1024, autocast: str = "none"
) -> TokenScores:
    """Log-probability (and entropy) of each of the N target tokens, [N] float32, in row-major order.

    Only target positions pass the LM head, `chunk` rows of logits at a time. autocast "bfloat16": matrix products in
    bfloat16, log-softmax in float32. Differentiable where gradients are on.
    """
    batch = batch.to(model.device)
    with autocasting(model.device, autocast):
        head = head_of(model)
        if head is None:
            logits = _run(run_logits, model, batch)
            return token_logprobs(predicting(logits, batch.target_mask), target_ids(batch), entropy)
        states = predicting(trunk_states(model, batch), batch.target_mask)
        return chunked_logprobs(states, head, target_ids(batch), chunk=chunk, entropy=entropy)


def autocasting(device: torch.device, autocast: str) -> AbstractContextManager[object]:
    """The context of config.model.autocast: "none" or "bfloat16"."""
    return nullcontext() if autocast == "none" else torch.autocast(device.type, dtype=torch.bfloat16)


def _run(run: _Run, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[B, L, D] of `run` over the batch's layout."""
    if batch.segment_ids is None:
        return run(model, batch.ids, None)
    if plan(model).packs:
        return run(model, batch.ids, batch.position_ids)
    return _run_apart(run, model, batch)


def _run_apart(run: _Run, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The packed examples as rows of their own, and the result put back in their places: right for every architecture."""
    positions = batch.position_ids
    assert positions is not None
    real = batch.attention_mask.bool()
    starts = (positions == 0)[real]  # [tokens], row-major: the order in which the examples are unpacked too
    example, place = starts.cumsum(0) - 1, positions[real]
    rows, width = int(example[-1]) + 1 if len(example) else 0, int(place.max()) + 1 if len(place) else 0
    ids = torch.zeros(rows, width, dtype=batch.ids.dtype, device=batch.ids.device)
    ids[example, place] = batch.ids[real]
    out = run(model, ids, None)
    return out.new_zeros(*batch.ids.shape, out.shape[-1]).index_put(real.nonzero(as_tuple=True), out[example, place])

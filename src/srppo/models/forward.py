"""Running a model on a batch: the states that predict the target tokens, and the tokens' log-probabilities.

Where the architecture allows it (plan.flat) the sequences are run as one flat row: no padding, and no token after the last
one that predicts a target.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srppo.logprobs import chunked_logprobs, token_logprobs
from srppo.masking import predicting, target_ids
from srppo.models.attention import NAME
from srppo.models.flat import flat_row
from srppo.models.plan import head_of, plan, run_logits, run_trunk
from srppo.models.prefix import run_above
from srppo.records import TokenBatch, TokenScores

_Run = Callable[..., Tensor]


def target_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[N, H] states that enter the LM head (final norm applied) and predict the N target tokens, in row-major order.

    model: a causal language model, or its bare trunk; batch on its device. No token sees padding or another example of its
    row, and no padding mask is passed: attention then takes its fast causal path.
    """
    if batch.prefix is None or model.config.get_text_config()._attn_implementation != NAME:
        return _predicting(run_trunk, model, batch)
    row = flat_row(batch)
    return run_above(model, batch.prefix.states, row, batch.prefix.depth)[0].index_select(0, row.predicting)


def token_scores(
    model: PreTrainedModel,
    batch: TokenBatch,
    *,
    entropy: bool = False,
    states: bool = False,
    chunk: int | None = None,
    autocast: str = "none",
) -> TokenScores:
    """Log-probability (and entropy, and states) of each of the N target tokens, [N] float32, in row-major order.

    Only target positions pass the LM head, `chunk` rows of logits at a time (by default logprobs.rows_at_once). autocast "bfloat16":
    matrix products in bfloat16, log-softmax in float32. Differentiable where gradients are on.
    """
    batch = batch.to(model.device)
    with autocasting(model.device, autocast):
        head = head_of(model)
        if head is None:
            scores = token_logprobs(_predicting(run_logits, model, batch), target_ids(batch), entropy)
            return replace(scores, states=target_states(model, batch)) if states else scores
        entering = target_states(model, batch)
        scores = chunked_logprobs(entering, head, target_ids(batch), chunk=chunk, entropy=entropy)
        return replace(scores, states=entering) if states else scores


def autocasting(device: torch.device, autocast: str) -> AbstractContextManager[object]:
    """The context of config.model.autocast: "none" or "bfloat16".

    Without autocast's cache, which would hold a bfloat16 copy of every trained weight until the pass is over: a pass uses a weight once,
    and with gradient checkpointing, or weights spread over processes, its copy can go with its layer.
    """
    return nullcontext() if autocast == "none" else torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def _predicting(run: _Run, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[N, D] of `run` at the positions that predict the targets."""
    ours = model.config.get_text_config()._attn_implementation == NAME  # not while a rollout uses another
    if ours and plan(model).flat and bool(batch.target_mask.any()):
        row = flat_row(batch)
        return run(model, row.ids[None], row.positions[None], row.layout)[0].index_select(0, row.predicting)
    return predicting(_padded(run, model, batch), batch.target_mask)


def _padded(run: _Run, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """[B, L, D] of `run` over a batch with padding."""
    if batch.segment_ids is None:
        return run(model, batch.ids)
    if plan(model).packs:
        return run(model, batch.ids, batch.position_ids)
    return _apart(run, model, batch)


def _apart(run: _Run, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The packed examples as rows of their own, and the result put back in their places: right for every architecture."""
    positions = batch.position_ids
    assert positions is not None
    real = batch.attention_mask.bool()
    starts = (positions == 0)[real]  # [tokens], row-major: the order in which the examples are unpacked too
    example, place = starts.cumsum(0) - 1, positions[real]
    rows, width = int(example[-1]) + 1 if len(example) else 0, int(place.max()) + 1 if len(place) else 0
    ids = torch.zeros(rows, width, dtype=batch.ids.dtype, device=batch.ids.device)
    ids[example, place] = batch.ids[real]
    out = run(model, ids)
    return out.new_zeros(*batch.ids.shape, out.shape[-1]).index_put(real.nonzero(as_tuple=True), out[example, place])

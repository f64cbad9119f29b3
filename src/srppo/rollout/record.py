"""What every engine does before and after sampling: prompts checked against the model's positions, tokens made into a Rollout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from srppo.errors import DataError, ModelError
from srppo.records import Rollout
from srppo.rollout.engine import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Answer = tuple[int, Sequence[int], Sequence[float]]  # a row's number, its tokens with the EOS, their log-probabilities


def position_limit(config: PretrainedConfig) -> int | None:
    """How many tokens a sequence may have: the model's positions, stretched where its rotary ones are; None if there is no limit."""
    text: Any = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    rotary = getattr(text, "rope_parameters", None) or {}
    for parameters in [rotary, *rotary.values()]:  # one for all layers, or one for each kind of layer
        if limit and isinstance(parameters, dict) and parameters.get("original_max_position_embeddings") and parameters.get("factor"):
            limit = max(limit, int(parameters["original_max_position_embeddings"] * parameters["factor"]))
    return limit


def check_lengths(lengths: Sequence[int], new_tokens: int, limit: int | None) -> None:
    """Raises DataError for a prompt (of so many tokens) that is empty, or leaves no room for the new tokens within the limit."""
    for row, length in enumerate(lengths):
        if length == 0:
            raise DataError(f"prompt {row} has no tokens, so there is nothing to continue; give it text, or a BOS token")
        if limit is not None and length + new_tokens > limit:
            raise DataError(
                f"prompt {row} has {length} tokens; with {new_tokens} new ones it exceeds the model's {limit} positions. "
                f"Lower rollout.max_new_tokens, or drop prompts over {max(limit - new_tokens, 0)} tokens (data.max_prompt_tokens)"
            )


def rollout_of(
    prompts: list[tuple[int, ...]], prompt_index: Sequence[int] | None, tokens: Tensor, logprobs: Tensor, eos_ids: Sequence[int]
) -> Rollout:
    """tokens and logprobs [B, limit] as a Rollout: cut after each row's first EOS and at the longest response.

    Raises ModelError for a log-probability of a response token that is not finite.
    """
    is_eos = torch.isin(tokens, torch.tensor(list(eos_ids), dtype=torch.int64))
    mask = is_eos.cumsum(1) - is_eos.long() == 0  # no EOS before this token
    if not logprobs[mask].isfinite().all():
        row, column = ((~logprobs.isfinite()) & mask).nonzero()[0].tolist()
        raise ModelError(
            f"the model gives NaN or infinite logits: prompt {row}, response token {column + 1}. "
            "Its weights have diverged, or its precision overflows; look at the last training metrics, or try float32 or bfloat16"
        )
    width = int(mask.sum(1).max()) if len(prompts) else 0
    mask = mask[:, :width]
    return Rollout(
        prompt_ids=[list(p) for p in prompts],
        prompt_index=list(range(len(prompts))) if prompt_index is None else list(prompt_index),
        responses=tokens[:, :width] * mask,
        mask=mask,
        behaviour_logprobs=torch.where(mask, logprobs[:, :width], 0.0),
        ended=is_eos.any(1),
    )


def gathered(
    answers: Iterable[Answer],
    prompts: list[tuple[int, ...]],
    prompt_index: Sequence[int] | None,
    limit: int,
    eos_ids: Sequence[int],
    on_progress: Progress | None,
) -> Rollout:
    """The Rollout of rows that are answered one by one, in any order, with at most `limit` tokens each. Raises as rollout_of."""
    tokens = torch.zeros(len(prompts), limit, dtype=torch.int64)
    logprobs = torch.zeros(len(prompts), limit, dtype=torch.float32)
    for done, (row, ids, scores) in enumerate(answers, 1):
        tokens[row, : len(ids)] = torch.tensor(ids)
        logprobs[row, : len(ids)] = torch.tensor(scores)
        if on_progress is not None:
            on_progress(done, len(prompts))
    return rollout_of(prompts, prompt_index, tokens, logprobs, eos_ids)

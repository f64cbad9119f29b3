"""Demonstrations in the shape of rollouts, so that what scores a model's samples scores them too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from srppo.records import Example, Rollout, pad_sequences


def as_rollout(examples: Sequence[Example], eos_ids: Sequence[int]) -> Rollout:
    """Demonstrations as a Rollout: the last contiguous run of target tokens is the response, all before it the prompt.

    examples: n demonstrations. eos_ids: the tokens that end a response. Returns B <= n rows in the order of the examples, with
    prompt_index their positions in it: examples without prompt tokens, or without target tokens, are left out.
    ended [B] is whether the last response token is an EOS; behaviour_logprobs [B, T] are zeros, as no policy sampled these.
    Tokens after the response (what a chat template closes a turn with) are left out too.
    """
    prompts, responses, index = [], [], []
    for i, example in enumerate(examples):
        start, end = _last_run(example.target_mask)
        if 0 < start < end:
            prompts.append(example.ids[:start])
            responses.append(example.ids[start:end])
            index.append(i)
    mask = pad_sequences([[1] * len(r) for r in responses]).bool()
    ended = torch.tensor([r[-1] in eos_ids for r in responses], dtype=torch.bool)
    return Rollout(prompts, index, pad_sequences(responses), mask, torch.zeros(mask.shape), ended)


def _last_run(mask: Sequence[int]) -> tuple[int, int]:
    """Start and end (exclusive) of the last run of nonzero entries; (0, 0) where there is none."""
    end = max((i + 1 for i, on in enumerate(mask) if on), default=0)
    start = end
    while start and mask[start - 1]:
        start -= 1
    return start, end

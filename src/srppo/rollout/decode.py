"""Decoding one batch: prompts in, sampled tokens out, through a key-value cache that rows leave when they end.

R rows of the batch, r of them not left yet, P prompt columns (left-padded), T response limit, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from srppo.rollout.cache import all_growing, join, new_cache, select
from srppo.rollout.engine import Sampling
from srppo.rollout.sampling import draw
from srppo.rollout.stats import DecodeStats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFILL_TOKENS = 8192  # prompt tokens, padding included, in one forward pass: bounds the memory of long prompts
LEAVING_SHARE = 8  # ended rows leave once they are one in so many: moving the cache costs about two steps' attention


def checks_every(device: torch.device) -> int:
    """Steps between asking which rows have ended: on a device apart the answer is waited for."""
    return 1 if device.type == "cpu" else 8


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model, adapters inside, without PEFT's wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Step(Protocol):
    """What decoding asks of a model, or of several that speak as one (extrapolation.py)."""

    pad_id: int
    device: torch.device
    config: PretrainedConfig  # of its attention; several models' is alike

    def new_cache(self) -> DynamicCache: ...

    def __call__(self, ids: Tensor, attention: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """ids and positions [R, Q]; attention [R, columns so far + Q]. Returns the logits [R, V] after each row's last token."""
        ...


class NextToken:
    """The model as a function: tokens and a cache in, the logits after each row's last token out."""

    def __init__(self, model: PreTrainedModel, pad_id: int):
        inner = unwrapped(model)  # PEFT passes its arguments on
        accepted = inspect.signature(inner.forward).parameters
        self.model, self.pad_id, self.config, self.device = model, pad_id, inner.config, model.device
        self.takes_positions = "position_ids" in accepted  # models with ALiBi have none
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def new_cache(self) -> DynamicCache:
        return new_cache(self.config)

    def __call__(self, ids: Tensor, attention: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """ids and positions [R, Q]; attention [R, columns so far + Q]. Returns [R, V]."""
        places = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=ids, attention_mask=attention, past_key_values=cache, use_cache=True, return_dict=True, **places, **self.options
        )
        return output.logits[:, -1]


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts as (ids, attention, positions), each [R, P] int64; a row's first token has position 0 wherever it stands."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    starts = torch.tensor([[width - len(p)] for p in prompts], device=device)
    positions = torch.arange(width, device=device) - starts
    return ids, (positions >= 0).long(), positions.clamp(min=0)


def passes(lengths: Sequence[int], tokens: int) -> list[slice]:
    """Cut rows into runs of at most so many tokens, padding included; a row longer than that is a run by itself."""
    cuts, start, width = [], 0, 0
    for row, length in enumerate(lengths):
        width = max(width, length)
        if row > start and width * (row + 1 - start) > tokens:
            cuts.append(slice(start, row))
            start, width = row, length
    return [*cuts, slice(start, len(lengths))]


@dataclass(frozen=True)
class Read:
    """Distinct prompts after their forward pass."""

    cache: DynamicCache  # of the distinct prompts, left-padded
    rows: Tensor  # [R] for each prompt that was asked for, in order, its number in the cache
    logits: Tensor  # [R, V] that follow the prompts


def read(model: Step, prompts: Sequence[tuple[int, ...]], stats: DecodeStats) -> Iterator[Read]:
    """Read prompts, of which equal ones stand side by side and are read once, in passes of at most PREFILL_TOKENS.

    The R of all passes together are the prompts, in their order.
    """
    counts = Counter(prompts)  # keeps the order
    distinct, repeats = list(counts), torch.tensor(list(counts.values()))
    # recurrent states, which some layers keep, cannot be joined
    runs = passes([len(p) for p in distinct], PREFILL_TOKENS) if all_growing(model.new_cache()) else [slice(None)]
    for run in runs:
        ids, attention, positions = left_padded(distinct[run], model.pad_id, model.device)
        cache = model.new_cache()
        scores = model(ids, attention, positions, cache)
        tokens = sum(len(p) for p in distinct[run])
        stats.prefill_tokens += tokens
        stats.padding_tokens += ids.numel() - tokens
        rows = torch.arange(len(ids)).repeat_interleave(repeats[run]).to(model.device)
        yield Read(cache, rows, scores.index_select(0, rows))


def prefill(model: Step, prompts: Sequence[tuple[int, ...]], stats: DecodeStats) -> tuple[DynamicCache, Tensor]:
    """`read` in one: the cache of R rows and the logits [R, V] that follow the prompts."""
    parts = list(read(model, prompts, stats))
    if len(parts) > 1:
        return join([p.cache for p in parts], [p.rows for p in parts], max(map(len, prompts))), torch.cat([p.logits for p in parts])
    if len(parts[0].rows) > len(set(prompts)):
        select(parts[0].cache, parts[0].rows)
    return parts[0].cache, parts[0].logits


def decode(
    model: Step,
    prompts: Sequence[tuple[int, ...]],
    uniforms: Tensor,
    eos_ids: Sequence[int],
    sampling: Sampling,
    on_ended: Callable[[int], None],
    stats: DecodeStats,
) -> tuple[Tensor, Tensor]:
    """Sample a response to each of R prompts, equal ones side by side, in one batch that only gets smaller.

    The way of models with recurrent layers, whose rows have to be of one age (refill.py has the other).

    uniforms: [R, T] float64 on the model's device, unused when greedy. on_ended(n): n more rows have ended,
    which may be 0.
    Returns tokens [R, T] int64 and their untempered log-probabilities [R, T] float32; what follows a row's first EOS is without meaning.
    """
    device, limit = model.device, sampling.max_new_tokens
    eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    tokens = torch.zeros(len(prompts), limit, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(prompts), limit, dtype=torch.float32, device=device)
    lengths = [len(p) for p in prompts]
    width = max(lengths)
    pads = torch.tensor([width - n for n in lengths], device=device)  # [r]
    attention = (torch.arange(width + limit, device=device) >= pads[:, None]).long()  # [r, columns]
    positions = torch.tensor(lengths, device=device)[:, None]
    rows = torch.arange(len(prompts), device=device)  # [r] the batch row of each row still decoded
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)  # [r]
    reported = 0
    every = checks_every(device)

    cache, logits = prefill(model, prompts, stats)
    for step in range(limit):
        token, logprob = draw(logits, uniforms[rows, step], sampling)
        tokens[rows, step], logprobs[rows, step] = token, logprob
        ended |= torch.isin(token, eos)
        if step + 1 == limit:
            break
        if (step + 1) % every == 0:
            gone = int(ended.sum())  # of the rows still here
            done = len(prompts) - len(rows) + gone
            on_ended(done - reported)
            reported = done
            if gone == len(rows):
                break
            if gone * LEAVING_SHARE >= len(rows):
                stay = (~ended).nonzero()[:, 0]
                first = int(pads[stay].min()) if all_growing(cache) else 0  # padding of all leaves with the longest prompt
                select(cache, stay, first)
                rows, ended, token, positions = rows[stay], ended[stay], token[stay], positions[stay]
                attention, pads, width = attention[stay, first:], pads[stay] - first, width - first
        stats.row_steps += len(rows)
        logits = model(token[:, None], attention[:, : width + step + 1], positions, cache)
        positions = positions + 1
    on_ended(len(prompts) - reported)
    return tokens, logprobs

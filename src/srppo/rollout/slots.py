"""A key-value cache of numbered slots: each holds one row, whose columns begin at 0 and end where the row does.

Rows of different ages stand side by side, and a new one takes the slot of one that has ended: only its own prompt is
copied. Every shape is given by (rows in use, columns seen), so a step can be captured as a CUDA graph.
S slots, R of them in use, H key-value heads, C capacity, D head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from srppo.rollout.attention import NAME
from srppo.rollout.cache import ROOM, GrowingLayer, all_growing


@dataclass
class Places:
    """What all layers of a cache share."""

    columns: Tensor  # [S] int64: where each slot's next token goes
    numbers: Tensor  # [S] 0, 1, 2, ...
    rows: int  # R: the slots in use are the first R
    seen: int  # columns that queries see; a slot's own end is in the attention mask
    capacity: int  # what a buffer may grow to: the longest prompt with its response


class SlotLayer(DynamicLayer):
    """Keys and values of one attention layer, [S, H, C, D]; a sliding window is left to the mask (attention.decode_mask)."""

    def __init__(self, places: Places, window: int | None, room: int):
        super().__init__()
        self.places, self.window, self.is_sliding, self.room = places, window, window is not None, room

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write [R, H, 1, D] states, each in its slot's column, and return what the queries may see, [R, H, seen, D]."""
        places = self.places
        assert self.keys is not None and self.values is not None and key_states.shape[-2] == 1
        if places.seen > self.keys.shape[-2]:
            self._grow(places.seen)
        where = (places.numbers[: places.rows], slice(None), places.columns[: places.rows])
        self.keys[where] = key_states[:, :, 0]
        self.values[where] = value_states[:, :, 0]
        return self.keys[: places.rows, :, : places.seen], self.values[: places.rows, :, : places.seen]

    def get_seq_length(self) -> int:
        return self.places.seen - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.seen, 0

    def insert(self, prompts: GrowingLayer, rows: Tensor, columns: Tensor, slots: Tensor) -> None:
        """Copy the prompts' states, of the rows of these numbers and from these columns [N, P] on, to the slots' beginnings."""
        if prompts.keys is None or prompts.values is None:  # a layer that shares another's keys stores none
            return
        if self.keys is None:
            count, capacity = len(self.places.numbers), min(columns.shape[1] + self.room, self.places.capacity)
            # zeros, not what memory happened to hold: a masked column's value is multiplied by 0
            self.keys, self.values = (x.new_zeros(count, x.shape[1], capacity, x.shape[-1]) for x in (prompts.keys, prompts.values))
            self.dtype, self.device, self.is_initialized = prompts.keys.dtype, prompts.keys.device, True
        assert self.values is not None
        if columns.shape[1] > self.keys.shape[-2]:
            self._grow(columns.shape[1])
        to = (slots[:, None], slice(None), torch.arange(columns.shape[1], device=slots.device)[None])
        self.keys[to] = prompts.keys[rows[:, None], :, columns]
        self.values[to] = prompts.values[rows[:, None], :, columns]

    def move(self, source: Tensor, target: Tensor, columns: int) -> None:
        """Copy the slots of these numbers over those, as far as so many columns."""
        if self.keys is not None and self.values is not None:
            for x in (self.keys, self.values):
                x[target, :, :columns] = x[source, :, :columns]

    def _grow(self, columns: int) -> None:
        assert self.keys is not None and self.values is not None
        capacity = min(max(columns, self.keys.shape[-2] + self.room), self.places.capacity)
        for name in ("keys", "values"):  # one at a time: each old buffer goes before the next new one comes
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[-1])
            new[:, :, : old.shape[-2]] = old
            setattr(self, name, new)


def fits(cache: DynamicCache, config: PretrainedConfig) -> bool:
    """Whether rows of this cache can stand in slots: no recurrent states, and windows only where our mask draws them."""
    if not all_growing(cache):
        return False
    text: Any = config.get_text_config(decoder=True)
    windows = any(cast(GrowingLayer, layer).window is not None for layer in cache.layers)
    chunks = "chunked_attention" in (getattr(text, "layer_types", None) or ()) or getattr(text, "attention_chunk_size", None)
    return not windows or (text._attn_implementation == NAME and not chunks)


def slot_cache(example: DynamicCache, places: Places, fixed: bool) -> DynamicCache:
    """A cache like the example (all growing, empty), on slots. fixed: its buffers have their full capacity from the start."""
    cache = copy.copy(example)
    room = places.capacity if fixed else ROOM
    cache.layers = [SlotLayer(places, cast(GrowingLayer, layer).window, room) for layer in example.layers]
    return cache


def insert(cache: DynamicCache, prompts: DynamicCache, rows: Tensor, lengths: Sequence[int], slots: Tensor) -> None:
    """Put rows (numbers [N]) of a cache of left-padded prompts, of these N lengths, into slots (numbers [N])."""
    width = cast(GrowingLayer, prompts.layers[0]).length
    longest = max(lengths)
    starts = torch.tensor([width - n for n in lengths], device=slots.device)
    columns = (starts[:, None] + torch.arange(longest, device=slots.device)).clamp(max=width - 1)  # [N, P]
    for layer, source in zip(cache.layers, prompts.layers, strict=True):
        cast(SlotLayer, layer).insert(cast(GrowingLayer, source), rows, columns, slots)


def move(cache: DynamicCache, source: Tensor, target: Tensor, columns: int) -> None:
    for layer in cache.layers:
        cast(SlotLayer, layer).move(source, target, columns)

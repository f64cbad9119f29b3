"""A key-value cache whose rows can be chosen and repeated, and whose layers grow without copying the past at every step.

transformers' own growing layer concatenates, which copies all keys and values of all rows at each token.
R rows, H key-value heads, C capacity, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # columns a full layer grows by


class GrowingLayer(DynamicLayer):
    """Keys and values of one attention layer in buffers [R, H, C, D], of which the first `length` columns are filled.

    window: what a sliding-window layer sees, itself included; None for full attention. Older columns stay
    stored, out of sight, so that rows and columns are chosen alike in both kinds of layer.
    """

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Append [R, H, Q, D] states and return what the Q queries may see."""
        seen, new = self.length, key_states.shape[-2]
        self.length = seen + new
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        if self.length > self.keys.shape[-2]:
            self.keys, self.values = (_room(x[:, :, :seen], self.length + ROOM) for x in (self.keys, self.values))
        self.keys[:, :, seen : self.length] = key_states
        self.values[:, :, seen : self.length] = value_states
        first = seen - self._visible(seen)
        return self.keys[:, :, first : self.length], self.values[:, :, first : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns that `update` will return, number of the first of them), from which transformers builds the mask."""
        visible = self._visible(self.length)
        return visible + query_length, self.length - visible

    def _visible(self, columns: int) -> int:
        """How many of the stored columns the next query sees."""
        return columns if self.window is None else min(columns, self.window - 1)

    def select(self, rows: Tensor, first: int) -> None:
        """Keep the rows of these numbers, and of their columns those from `first` on."""
        if self.keys is not None and self.values is not None:
            length = self.length - first
            self.keys, self.values = (
                _room(x[:, :, first : self.length].index_select(0, rows), length + ROOM) for x in (self.keys, self.values)
            )
            self.length = length


def _room(x: Tensor, capacity: int) -> Tensor:
    """x [R, H, L, D] at the start of a new buffer [R, H, capacity, D]."""
    buffer = x.new_empty(*x.shape[:2], capacity, x.shape[-1])
    buffer[:, :, : x.shape[-2]] = x
    return buffer


def new_cache(config: PretrainedConfig) -> DynamicCache:
    """transformers' cache for this architecture, its plain attention layers (full or sliding) replaced by growing ones."""
    cache = DynamicCache(config=config)
    cache.layers = [_growing(layer) for layer in cache.layers]
    return cache


def _growing(layer: Any) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return GrowingLayer(layer.sliding_window)
    return GrowingLayer() if type(layer) is DynamicLayer else layer


def all_growing(cache: DynamicCache) -> bool:
    """Whether every layer is a growing one; recurrent and other special layers are not."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def select(cache: DynamicCache, rows: Tensor, first: int = 0) -> None:
    """Keep these rows (repeats and any order allowed), and the columns from `first` on where all layers grow."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if isinstance(layer, GrowingLayer):
            layer.select(rows, first)
        else:
            layer.reorder_cache(rows)


def join(caches: Sequence[DynamicCache], rows: Sequence[Tensor], width: int) -> DynamicCache:
    """One cache of the chosen rows of several, aligned at the right.

    caches: of growing layers only, each of its own length up to width, the columns of the result; used up.
    rows: for each cache the numbers of the rows to take, in order, repeats allowed.
    """
    for parts in zip(*(cast(list[GrowingLayer], cache.layers) for cache in caches)):
        keys = [part.keys[:, :, : part.length] for part in parts if part.keys is not None]
        values = [part.values[:, :, : part.length] for part in parts if part.values is not None]
        for part in parts:  # each layer's memory goes back as soon as it is copied
            part.keys = part.values = None
        if keys:  # a layer that shares another's keys stores none
            parts[0].keys, parts[0].values, parts[0].length = _join(keys, rows, width), _join(values, rows, width), width
    return caches[0]


def _join(states: Sequence[Tensor], rows: Sequence[Tensor], width: int) -> Tensor:
    """[R, H, width + ROOM, D]; zeros at the left of the shorter ones, since a masked column's value is multiplied by 0."""
    example = states[0]
    buffer = example.new_zeros(sum(len(r) for r in rows), example.shape[1], width + ROOM, example.shape[-1])
    done = 0
    for part, chosen in zip(states, rows):
        buffer[done : done + len(chosen), :, width - part.shape[-2] : width] = part.index_select(0, chosen)
        done += len(chosen)
    return buffer

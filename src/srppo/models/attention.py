"""Attention over a flat row: the tokens of many sequences one after the other, with no padding between them.

Everything in a transformer but attention works on tokens one by one, so it need not see padding at all. Only here are the
sequences put into the padded view [B, L], attended to by PyTorch's causal kernel, and put back.
N tokens of the flat row, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "srppo_flat"
PLAIN = ("sdpa", NAME)  # implementations that are PyTorch's attention


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a flat row are in the padded view."""

    cells: Tensor  # [B, L] int64, the place in the flat row of each cell; padding points at 0
    places: Tensor  # [N] int64, the cell (row * L + column) of each token of the flat row
    marker: Tensor  # [1, 1, 0, 0] bool: a mask that is "already prepared", so that transformers makes none; none can be taken for one

    @property
    def even(self) -> bool:
        """Whether the padded view has no padding."""
        return self.cells.numel() == len(self.places)


def layout_of(lengths: Tensor) -> Layout:
    """The layout of sequences of these lengths [B] (each at least 1), one after the other."""
    columns = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device)
    real = columns < lengths[:, None]
    starts = lengths.cumsum(0) - lengths
    cells = torch.where(real, starts[:, None] + columns, 0)
    return Layout(cells, real.flatten().nonzero().squeeze(1), torch.ones(1, 1, 0, 0, dtype=torch.bool, device=lengths.device))


def flat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    srppo_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa_attention_forward, and with a layout the same of each sequence of a flat row by itself, causal.

    query, key, value [1, H, N, D] with a layout; returns [1, N, H, D]. A layer's sliding_window is kept.
    """
    if srppo_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    rows, width = srppo_layout.cells.shape
    queries, keys, values = (_padded(x, srppo_layout) for x in (query, key, value))
    kwargs.pop("is_causal", None)
    mask = _window(kwargs.get("sliding_window"), width, query.device)
    output, _ = sdpa_attention_forward(module, queries, keys, values, mask, dropout=dropout, scaling=scaling, is_causal=True, **kwargs)
    flat = output.reshape(rows * width, *output.shape[2:])
    return (flat if srppo_layout.even else flat.index_select(0, srppo_layout.places)).unsqueeze(0), None


def _padded(x: Tensor, layout: Layout) -> Tensor:
    """[1, H, N, D] -> [B, H, L, D]. What stands on padding is some token's: causal attention keeps it from the others."""
    tokens = x[0].transpose(0, 1)  # [N, H, D]
    if not layout.even:
        tokens = tokens.index_select(0, layout.cells.flatten())
    return tokens.reshape(*layout.cells.shape, *tokens.shape[1:]).transpose(1, 2)


def _window(window: int | None, width: int, device: torch.device) -> Tensor | None:
    """[1, 1, L, L] bool, what a query of a sliding-window layer may see; None where the window holds every sequence."""
    if window is None or window >= width:
        return None
    place = torch.arange(width, device=device)
    behind = place[:, None] - place
    return ((behind >= 0) & (behind < window))[None, None]


def uses_plain_attention(model: PreTrainedModel) -> bool:
    """Whether the model reaches PyTorch's attention through transformers' interface, where ours can take its place.

    Not models with sparse attention (an indexer): they choose keys only under the names that transformers knows.
    """
    if any(name.endswith("indexer") for name, _ in model.named_modules()):
        return False
    return model.config.get_text_config()._attn_implementation in PLAIN and getattr(model, "_supports_attention_backend", False)


def noting(windows: set[int | None]) -> Callable[..., tuple[Tensor, None]]:
    """flat_attention that also notes the sliding windows it is called with."""

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        windows.add(kwargs.get("sliding_window"))
        return flat_attention(*args, **kwargs)

    return attention


def set_attention(model: PreTrainedModel, name: str, attention: Callable[..., Any] = flat_attention) -> None:
    """Let all parts of a model that use PyTorch's attention use it under this name: sdpa, or NAME for `attention`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        if getattr(config, "_attn_implementation", None) in PLAIN:
            config._attn_implementation = name

"""The growing cache against transformers' own layers, and grouped attention against transformers' sdpa."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from srppo.rollout import cache as cache_module
from srppo.rollout.attention import NAME, grouped, grouped_attention
from srppo.rollout.cache import GrowingLayer, all_growing, join, new_cache, select
from srppo.rollout.decode import passes


def states(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, columns, 4, generator=generator), torch.randn(rows, 2, columns, 4, generator=generator)


@pytest.mark.parametrize("window", [None, 2, 5, 9])
@pytest.mark.parametrize("prompt", [1, 4, 5, 12])
def test_a_layer_gives_what_transformers_gives(window: int | None, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "ROOM", 3)
    ours, theirs = GrowingLayer(window), DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    for step, columns in enumerate([prompt, *[1] * 10]):
        assert ours.get_mask_sizes(columns) == theirs.get_mask_sizes(columns) and ours.get_seq_length() == theirs.get_seq_length()
        new = states(3, columns, step)
        for a, b in zip(ours.update(*new), theirs.update(*new)):
            assert torch.equal(a, b)
        if step % 4 == 1:
            rows = torch.tensor([2, 0, 1])
            ours.select(rows, 0)
            theirs.reorder_cache(rows)


def test_columns_leave_at_the_left() -> None:
    cache = new_cache(LlamaConfig(num_hidden_layers=2))
    first = [states(4, 6, layer) for layer in range(2)]
    for layer in range(2):
        cache.update(*first[layer], layer)
    select(cache, torch.tensor([3, 3, 1]), first=2)
    assert cache.get_seq_length() == 4
    for layer in range(2):
        new = states(3, 1, 7)
        for part in (0, 1):
            expected = torch.cat([first[layer][part][[3, 3, 1], :, 2:], new[part]], -2)
            assert torch.equal(cache.update(*new, layer)[part] if part == 0 else cache.layers[layer].values[:, :, :5], expected)


def test_joining_aligns_at_the_right() -> None:
    config = MistralConfig(num_hidden_layers=1, sliding_window=100)
    caches, parts = [], [states(2, 5, 0), states(3, 3, 1)]
    for part in parts:
        caches.append(new_cache(config))
        caches[-1].update(*part, 0)
    joined = join(caches, [torch.tensor([0, 0, 1]), torch.tensor([2])], 5)
    keys, values = joined.update(*states(4, 1, 2), 0)
    for got, kind in ((keys, 0), (values, 1)):
        assert torch.equal(got[:3, :, :5], parts[0][kind][[0, 0, 1]])
        assert torch.equal(got[3, :, 2:5], parts[1][kind][2]) and not got[3, :, :2].any()
    assert joined.is_sliding == [True] and all_growing(joined)


@pytest.mark.parametrize(("tokens", "expected"), [(1, [(0, 1), (1, 2), (2, 3), (3, 4)]), (10, [(0, 2), (2, 4)]), (20, [(0, 4)])])
def test_passes_hold_so_many_tokens(tokens: int, expected: list[tuple[int, int]]) -> None:
    assert [(p.start, p.stop) for p in passes([5, 5, 4, 3], tokens)] == expected


@pytest.mark.parametrize("mask", ["none", "bool", "float", "per_head"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("shared", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_attention_is_sdpas(mask: str, queries: int, shared: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, queries, 8, generator=generator).to(dtype)
    key, value = (torch.randn(3, shared, 7, 8, generator=generator).to(dtype) for _ in range(2))
    seen = torch.rand(3, 1, queries, 7, generator=generator) < 0.6
    seen[..., 0] = True
    masks = {"none": None, "bool": seen, "float": torch.where(seen, 0.3, -torch.inf).to(dtype), "per_head": seen.expand(3, 6, queries, 7)}
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // shared, True
    bias = torch.randn(1, 6, queries, 7, generator=generator).to(dtype)
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for extra in ({}, {"scaling": 0.4}, {"scaling": 0.4, "position_bias": bias}):
        ours, _ = grouped_attention(module, query, key, value, masks[mask], **extra)
        theirs, _ = sdpa_attention_forward(module, query, key, value, masks[mask], **extra)
        torch.testing.assert_close(ours, theirs, **close)


def test_a_row_that_sees_nothing_gives_no_nan() -> None:
    """A slot without a row: what it gives is thrown away, but NaN would reach the check for diverged models."""
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    seen = torch.tensor([[True] * 5, [False] * 5])[:, None, None]
    ours, _ = grouped_attention(nn.Module(), query, key, key, seen)
    assert ours.isfinite().all()


def test_the_models_attention_is_lent_only() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa"))
    with pytest.raises(RuntimeError), grouped(model):
        assert model.config._attn_implementation == NAME
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    eager = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="eager"))
    with grouped(eager):
        assert eager.config._attn_implementation == "eager"

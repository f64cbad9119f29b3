"""A flat row gives what padded rows give, forward and backward, and has no token too many."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PhimoeConfig, PhimoeForCausalLM, PreTrainedModel

from srppo.models.attention import NAME, flat_attention, layout_of, set_attention
from srppo.models.flat import flat_row
from srppo.models.forward import target_states, token_scores
from srppo.models.plan import _PLANS, plan
from srppo.records import TokenBatch
from tiny_models import ARCHITECTURES, tiny_model

EVERY = [*ARCHITECTURES, "llama_tied", "cohere", "granite"]


def ragged(packed: bool = False) -> TokenBatch:
    """Five rows: one without targets, one with tokens after its last target, one all real, one of two tokens, one with a gap of
    targets. packed: of two examples each where they fit."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 100, (5, 12), generator=g)
    lengths = torch.tensor([7, 11, 12, 2, 9])
    attention = (torch.arange(12) < lengths[:, None]).long()
    targets = torch.zeros(5, 12, dtype=torch.bool)
    targets[1, 3:6], targets[2, 4:], targets[3, 1], targets[4, 2], targets[4, 6:9] = True, True, True, True, True
    if not packed:
        return TokenBatch(ids, attention, targets)
    segments = attention.clone()
    segments[2, 5:], segments[4, 4:9] = 2, 2
    targets[2, 5] = targets[4, 4] = False  # an example's first token is predicted by nothing
    return TokenBatch(ids, attention, targets, segments)


def padded_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that runs padded rows."""
    twin = copy.deepcopy(model)
    _PLANS[twin] = replace(plan(model), flat=False)
    set_attention(twin, "sdpa")
    return twin


def learned(model: PreTrainedModel, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    logprobs = token_scores(model, batch).logprobs
    (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
    return logprobs.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("architecture", EVERY)
def test_flat_equals_padded_forward_and_backward(architecture: str, packed: bool) -> None:
    model = tiny_model(architecture)  # in eval mode: dropout would be drawn in another order
    assert plan(model).flat and model.config._attn_implementation == NAME
    flat, padded = learned(model, ragged(packed)), learned(padded_twin(model), ragged(packed))
    torch.testing.assert_close(flat[0], padded[0], atol=5e-6, rtol=0)
    assert flat[1].keys() == padded[1].keys()
    for name, gradient in flat[1].items():
        torch.testing.assert_close(gradient, padded[1][name], atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_sliding_windows_are_kept() -> None:
    model = tiny_model("mistral", sliding_window=4)
    batch = ragged()
    torch.testing.assert_close(token_scores(model, batch).logprobs, token_scores(padded_twin(model), batch).logprobs, atol=5e-6, rtol=0)
    wide = tiny_model("mistral", sliding_window=40)
    assert (token_scores(model, batch).logprobs - token_scores(wide, batch).logprobs).abs().max() > 1e-3


def test_the_trunk_sees_no_padding_and_nothing_after_the_last_target() -> None:
    model, seen = tiny_model(), list[int]()
    plan(model)
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:-1].numel()))
    target_states(model, ragged())
    assert seen == [5 + 11 + 1 + 8]  # up to the token before the last target; the row without targets is left out


def test_flat_row_places() -> None:
    """Worked out by hand."""
    ids = torch.tensor([[5, 6, 7, 8, 0], [9, 10, 0, 0, 0]])
    targets = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    row = flat_row(TokenBatch(ids, (ids > 0).long(), targets))
    assert row.ids.tolist() == [5, 6, 7, 9] and row.positions.tolist() == [0, 1, 2, 0] and row.predicting.tolist() == [1, 2, 3]
    assert row.layout.cells.tolist() == [[0, 1, 2], [3, 0, 0]] and row.layout.places.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", [2, 4])
def test_attention_equals_torchs_on_each_sequence(heads: int, window: int | None) -> None:
    g = torch.Generator().manual_seed(1)
    lengths = [4, 1, 7]
    query = torch.randn(1, 4, sum(lengths), 8, generator=g, requires_grad=True)
    key, value = (torch.randn(1, heads, sum(lengths), 8, generator=g, requires_grad=True) for _ in range(2))
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // heads  # type: ignore[assignment]
    options = {"srppo_layout": layout_of(torch.tensor(lengths)), "sliding_window": window}
    ours, _ = flat_attention(module, query, key, value, None, **options)  # type: ignore[arg-type]
    apart = []
    for q, k, v in zip(*(x.split(lengths, 2) for x in (query, key, value))):
        place = torch.arange(q.shape[2])
        behind = place[:, None] - place
        mask = (behind >= 0) & (behind < (window or 99))
        k, v = (x.repeat_interleave(4 // heads, 1) for x in (k, v))
        apart.append(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2))
    theirs = torch.cat(apart, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    weights = torch.randn(ours.shape, generator=g)
    gradients = (torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (ours, theirs))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_a_saved_model_says_nothing_of_it(tmp_path: object) -> None:
    model = tiny_model()
    plan(model)
    model.save_pretrained(str(tmp_path))
    assert NAME not in (tmp_path / "config.json").read_text()  # type: ignore[operator]


def test_models_whose_windows_are_in_the_mask_alone_are_run_padded() -> None:
    """A window longer than the probe, which attention is not told of: a flat row would lose it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 103, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = PhimoeConfig(
        **sizes, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=10, initializer_range=0.3
    )
    model = PhimoeForCausalLM(config).eval()
    assert not plan(model).flat and model.config._attn_implementation == "sdpa"
    batch = ragged()
    apart = [
        token_scores(
            model, TokenBatch(batch.ids[r : r + 1, :n], batch.attention_mask[r : r + 1, :n], batch.target_mask[r : r + 1, :n])
        ).logprobs
        for r, n in enumerate(batch.attention_mask.sum(1).tolist())
    ]
    torch.testing.assert_close(token_scores(model, batch).logprobs, torch.cat(apart), atol=1e-5, rtol=0)


def test_scoring_while_another_attention_is_in_place_is_right() -> None:
    model, batch = tiny_model(), ragged()
    expected = token_scores(model, batch).logprobs
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        torch.testing.assert_close(token_scores(model, batch).logprobs, expected, atol=5e-6, rtol=0)

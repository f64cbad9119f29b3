"""Scores of a model are those of its plain forward pass, whatever the architecture, the padding, the packing or the head."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertLMHeadModel, PreTrainedModel

from srppo.errors import ModelError
from srppo.masking import predicting
from srppo.models.forward import target_states, token_scores
from srppo.models.load import silence_noise
from srppo.models.plan import _PLANS, Plan, head_of, plan
from srppo.records import TokenBatch
from tiny_models import ARCHITECTURES, tiny_model

EVERY = [*ARCHITECTURES, "llama_tied", "cohere", "granite"]
LENGTHS = [(4, 9), (2, 5), (6, 6), (1, 12)]  # (prompt, response) tokens


def sequences(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(7, 103, (n,), generator=g).tolist() for n in pair) for pair in LENGTHS]  # type: ignore[misc]


def padded(pairs: list[tuple[list[int], list[int]]], pad: int = 1) -> TokenBatch:
    width = max(len(p) + len(r) for p, r in pairs)
    ids = torch.full((len(pairs), width), pad)
    attention, target = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (p, r) in enumerate(pairs):
        n = len(p) + len(r)
        ids[row, :n] = torch.tensor(p + r)
        attention[row, :n] = 1
        target[row, len(p) : n] = True
    return TokenBatch(ids, attention, target)


def packed(pairs: list[tuple[list[int], list[int]]], rows: list[list[int]]) -> TokenBatch:
    """rows: which examples stand in each row, in order."""
    width = max(sum(len(pairs[i][0]) + len(pairs[i][1]) for i in row) for row in rows)
    ids, target = torch.ones(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.bool)
    segments = torch.zeros_like(ids)
    for r, row in enumerate(rows):
        at = 0
        for number, i in enumerate(row):
            p, a = pairs[i]
            end = at + len(p) + len(a)
            ids[r, at:end] = torch.tensor(p + a)
            segments[r, at:end] = number + 1
            target[r, at + len(p) : end] = True
            at = end
    return TokenBatch(ids, (segments > 0).long(), target, segments)


def by_hand(model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from one plain forward a sequence, without padding, in float64."""
    chosen, entropy = [], []
    for p, r in pairs:
        logits = model(input_ids=torch.tensor([p + r])).logits[0].double()
        every = (logits - logits.logsumexp(-1, keepdim=True))[len(p) - 1 : -1]
        chosen.append(every[torch.arange(len(r)), torch.tensor(r)])
        entropy.append(-(every.exp() * every).sum(-1))
    return torch.cat(chosen), torch.cat(entropy)


@pytest.mark.parametrize("architecture", EVERY)
def test_scores_equal_the_plain_forward(architecture: str) -> None:
    model, pairs = tiny_model(architecture), sequences()
    scores = token_scores(model, padded(pairs), entropy=True, chunk=5)
    chosen, entropy = by_hand(model, pairs)
    assert plan(model).direct_head
    torch.testing.assert_close(scores.logprobs.double(), chosen, atol=5e-6, rtol=0)
    torch.testing.assert_close(scores.entropy.double(), entropy, atol=5e-6, rtol=0)  # type: ignore[union-attr]
    assert scores.logprobs.dtype == torch.float32


@pytest.mark.parametrize("architecture", EVERY)
def test_target_states_enter_the_head(architecture: str) -> None:
    model, batch = tiny_model(architecture), padded(sequences())
    entering: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: entering.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=batch.ids, attention_mask=batch.attention_mask)
        handle.remove()
        states = target_states(model, batch)
    torch.testing.assert_close(states, predicting(entering[0], batch.target_mask), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", EVERY)
def test_what_stands_on_padding_changes_nothing(architecture: str) -> None:
    model, pairs = tiny_model(architecture), sequences()
    assert torch.equal(token_scores(model, padded(pairs, 1)).logprobs, token_scores(model, padded(pairs, 50)).logprobs)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("architecture", EVERY)
def test_packed_rows_equal_unpacked_ones(architecture: str, apart: bool) -> None:
    """Forward and gradient, by position ids and by the way that is right for every architecture."""
    model, pairs = tiny_model(architecture), sequences()
    assert plan(model).packs
    if apart:
        found = plan(model)
        _PLANS[model] = Plan(found.width, False, found.direct_head, found.softcap, found.multiplier)
    one, many = padded(pairs), packed(pairs, [[0, 1], [2], [3]])
    results = []
    for batch in (one, many):
        scores = token_scores(model, batch, entropy=True)
        model.zero_grad()
        (scores.logprobs * torch.linspace(1, 2, len(scores.logprobs))).sum().backward()
        results.append((scores, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (a, ga), (b, gb) = results
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=5e-6, rtol=0)
    torch.testing.assert_close(a.entropy, b.entropy, atol=5e-6, rtol=0)
    for x, y in zip(ga, gb, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


def test_packing_that_leaks_is_found_out() -> None:
    """A model that ignores position ids must not be packed by them."""
    model = tiny_model("llama")
    inner = model.get_decoder()
    plain = inner.forward
    inner.forward = lambda *args, position_ids=None, **kwargs: plain(*args, **kwargs)  # type: ignore[method-assign]
    pairs = sequences()
    assert not plan(model).packs
    torch.testing.assert_close(
        token_scores(model, packed(pairs, [[0, 1, 2, 3]])).logprobs, token_scores(model, padded(pairs)).logprobs, atol=5e-6, rtol=0
    )


def test_no_targets_give_no_scores() -> None:
    batch = padded(sequences())
    empty = TokenBatch(batch.ids, batch.attention_mask, torch.zeros_like(batch.target_mask))
    assert token_scores(tiny_model(), empty, entropy=True).logprobs.shape == (0,)


class Odd(nn.Module):
    """A head no formula of ours describes."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        return z + 0.3 * z.sin()


def test_an_unknown_head_falls_back_to_the_models_own_logits() -> None:
    model, pairs = tiny_model("llama"), sequences()
    model.lm_head = Odd(model.lm_head)
    with pytest.warns(UserWarning, match="full forward"):
        scores = token_scores(model, padded(pairs), entropy=True)
    chosen, entropy = by_hand(model, pairs)
    torch.testing.assert_close(scores.logprobs.double(), chosen, atol=5e-6, rtol=0)
    torch.testing.assert_close(scores.entropy.double(), entropy, atol=5e-6, rtol=0)  # type: ignore[union-attr]
    torch.testing.assert_close(token_scores(model, packed(pairs, [[0, 1, 2, 3]])).logprobs.double(), chosen, atol=5e-6, rtol=0)


def test_a_scaling_unknown_to_us_is_found_by_the_probe() -> None:
    """As if transformers had a new architecture that multiplies its logits under a name we do not read."""
    model, pairs = tiny_model("granite"), sequences()
    model.config.logits_scaling = 1.0
    model.forward = lambda *args, plain=model.forward, **kwargs: _scaled(plain(*args, **kwargs))  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="full forward"):
        assert head_of(model) is None
    torch.testing.assert_close(token_scores(model, padded(pairs)).logprobs.double(), by_hand(model, pairs)[0], atol=5e-6, rtol=0)


def _scaled(out: object) -> object:
    out.logits = out.logits * 1.5  # type: ignore[attr-defined]
    return out


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_autocast_computes_in_bfloat16_and_normalises_in_float32(architecture: str) -> None:
    model, pairs = tiny_model(architecture), sequences()
    used: list[torch.dtype] = []
    model.get_decoder().layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: used.append(output.dtype))
    exact = token_scores(model, padded(pairs), entropy=True)
    rough = token_scores(model, padded(pairs), entropy=True, autocast="bfloat16")
    assert used[-1] == torch.bfloat16
    assert rough.logprobs.dtype == torch.float32
    assert 0 < (exact.logprobs - rough.logprobs).abs().max() < 0.2
    rough.logprobs.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_half_precision_model_is_recognised_like_its_float32_twin() -> None:
    for architecture in EVERY:
        model = tiny_model(architecture).bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert plan(model).direct_head and plan(model).packs, architecture


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "mistral"])
def test_every_attention_implementation_keeps_packed_examples_apart(architecture: str) -> None:
    model, pairs = tiny_model(architecture), sequences()
    expected = by_hand(model, pairs)[0]
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        for batch in (padded(pairs), packed(pairs, [[3, 0], [1, 2]])):
            order = [0, 1, 2, 3] if batch.segment_ids is None else [3, 0, 1, 2]
            parts = dict(zip(order, token_scores(model, batch).logprobs.split([LENGTHS[i][1] for i in order])))
            torch.testing.assert_close(torch.cat([parts[i] for i in range(4)]).double(), expected, atol=5e-6, rtol=0)


def test_a_bidirectional_model_is_refused() -> None:
    config = BertConfig(vocab_size=103, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, is_decoder=False)
    with pytest.raises(ModelError, match="not causal"):
        plan(BertLMHeadModel(config).eval())


def test_dropout_is_off_in_train_mode() -> None:
    """GPT-2 comes with dropout 0.1: the same weights must still give the same probabilities in train mode."""
    model, batch = tiny_model("gpt2"), padded(sequences())
    silence_noise(model)
    expected = token_scores(model, batch).logprobs
    model.train()
    assert torch.equal(token_scores(model, batch).logprobs, expected)
    assert model.training


def test_probing_leaves_the_mode_alone() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    plan(model)
    assert model.training and not model.transformer.h[0].training


def test_predicting_positions_are_those_scored() -> None:
    """A model certain of one next token everywhere: only responses that repeat it are likely."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = nn.Parameter(torch.zeros(103))
        model.lm_head.bias[42] = 50.0
    batch = padded([([8, 9], [42, 43, 42]), ([42], [42, 7])])
    likely = token_scores(model, batch).logprobs > -1e-3
    assert likely.tolist() == [True, False, True, True, False]
    assert torch.equal(predicting(batch.ids, batch.target_mask), torch.tensor([9, 42, 43, 42, 42]))


def test_copies_score_alike() -> None:
    model, batch = tiny_model("gemma3"), padded(sequences())
    assert torch.equal(token_scores(copy.deepcopy(model), batch).logprobs, token_scores(model, batch).logprobs)

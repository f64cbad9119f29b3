"""Filters against Hugging Face's, the inverse distribution function against a plain cumulative sum and frequencies."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import TopKLogitsWarper, TopPLogitsWarper

from srppo.rollout.engine import Sampling
from srppo.rollout.sampling import draw, inverse_cdf, top_k_filter, top_p_filter


def logits(rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * scale


@pytest.mark.parametrize("k", [1, 5, 300, 5000])
def test_top_k_is_hugging_faces(k: int) -> None:
    scores = logits(6, 1000).mul(2).round()  # with ties
    assert torch.equal(top_k_filter(scores, k), TopKLogitsWarper(k)(None, scores))


@pytest.mark.parametrize("p", [1e-9, 1e-6, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_top_p_is_hugging_faces(p: float, scale: float) -> None:
    scores = logits(6, 1000, scale)
    assert torch.equal(top_p_filter(scores, p), TopPLogitsWarper(p)(None, scores))
    filtered = top_k_filter(scores, 40)
    assert torch.equal(top_p_filter(filtered, p), TopPLogitsWarper(p)(None, filtered))


def test_top_p_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    kept = [set(top_p_filter(scores, p).isfinite().nonzero()[:, 1].tolist()) for p in (0.4, 0.6, 0.75)]
    assert kept == [{0}, {0, 2}, {0, 2}]


@pytest.mark.parametrize("vocab", [7, 256, 257, 50_000])
def test_inverse_cdf_is_a_plain_cumulative_sum(vocab: int) -> None:
    weights = logits(100, vocab).softmax(-1)
    uniforms = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cumulative = weights.double().cumsum(-1)
    cumulative /= cumulative[:, -1:].clone()
    tokens = inverse_cdf(weights, uniforms)
    rows = torch.arange(100)
    below = torch.where(tokens > 0, cumulative[rows, (tokens - 1).clamp(min=0)], 0.0)
    assert (below - 1e-6 <= uniforms).all() and (uniforms < cumulative[rows, tokens] + 1e-6).all()
    assert (tokens == torch.searchsorted(cumulative, uniforms[:, None], right=True)[:, 0]).float().mean() >= 0.99
    assert torch.equal(tokens, inverse_cdf(weights * 37, uniforms))  # no need to normalise


@pytest.mark.parametrize("vocab", [5, 256, 1000])
@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0])
def test_inverse_cdf_never_takes_weight_zero(vocab: int, u: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.rand(300, vocab, generator=generator) * (torch.rand(300, vocab, generator=generator) < 0.3)
    weights[:, [0, vocab - 1]] = 0.0  # both ends filtered
    weights[:200, : vocab // 3] = weights[:200, -vocab // 3 :] = 0.0  # and more than a block of them
    weights[torch.arange(300), torch.randint(vocab // 3, vocab - vocab // 3, (300,), generator=generator)] = torch.logspace(-30, 3, 300)
    weights[0] = 0.0
    weights[0, 2] = 1e-38
    tokens = inverse_cdf(weights, torch.full((300,), u, dtype=torch.float64))
    assert (weights.gather(1, tokens[:, None]) > 0).all() and tokens[0] == 2
    if u == 0.0:
        assert torch.equal(tokens, (weights > 0).int().argmax(-1))
    if u == 1.0:
        assert (weights[200:].cumsum(-1).gather(1, tokens[200:, None])[:, 0] > 0.999 * weights[200:].sum(-1)).all()


def test_inverse_cdf_takes_a_small_tail() -> None:
    """A float32 cumulative sum would lose weights this small beside 1."""
    weights = torch.zeros(2560)
    weights[0], weights[256:] = 1.0, 1e-9
    uniforms = 1 - (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 * 2304e-9
    tokens = inverse_cdf(weights.expand(4000, -1), uniforms)
    assert (tokens >= 256).float().mean() > 0.99
    assert chisquare(tokens[tokens > 0].div(256, rounding_mode="floor").bincount(minlength=10)[1:]).pvalue > 1e-3


def test_inverse_cdf_frequencies() -> None:
    weights = logits(1, 400, 1.0).softmax(-1)
    uniforms = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    counts = inverse_cdf(weights.expand(20_000, -1), uniforms).bincount(minlength=400)
    assert chisquare(counts, weights[0].double() / weights.double().sum() * 20_000).pvalue > 1e-3


def test_inverse_cdf_of_a_diverged_row_stays_in_range() -> None:
    weights = torch.full((2, 300), torch.nan)
    weights[1] = 0.0
    tokens = inverse_cdf(weights, torch.tensor([0.3, 0.9], dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, greedy=True), Sampling(1, temperature=0.01), Sampling(1, 2.0, 0.5, 7)])
def test_draw_scores_with_the_models_own_distribution(sampling: Sampling, dtype: torch.dtype) -> None:
    scores = logits(50, 500).to(dtype)
    uniforms = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens, logprobs = draw(scores, uniforms, sampling)
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    expected = scores.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, atol=1e-5, rtol=0)
    if sampling.deterministic:
        assert torch.equal(tokens, scores.argmax(-1))

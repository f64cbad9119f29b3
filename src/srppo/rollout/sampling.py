"""Drawing tokens: filters and the inverse distribution function, row by row.

R rows of the decode batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from srppo.rollout.engine import Sampling

BLOCK = 256  # tokens summed at once in `inverse_cdf`


def top_k_filter(scores: Tensor, k: int) -> Tensor:
    """Scores [R, V] below the k-th largest of their row become -inf; ties with it stay."""
    least = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def top_p_filter(scores: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2020, arXiv 1904.09751, eq. 2): all but the likeliest tokens that together reach p become -inf.

    scores [R, V], logits. The likeliest token stays whatever p is.
    """
    ascending, index = scores.sort(dim=-1)
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[:, -1] = False
    return scores.masked_fill(torch.empty_like(tail).scatter_(1, index, tail), -torch.inf)


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first token at which the cumulative weight exceeds u times the total, so token v has probability w_v / sum w.

    weights [R, V] float32, at least 0, not normalised; uniforms [R] float64 in [0, 1]. Returns [R] int64.
    Never a token of weight 0, also at u = 0 and at the very top, where a rounded sum may fall short.
    The search has two levels: blocks of tokens, cumulated in float64, then the tokens of one block. A plain float64 sum
    over a large vocabulary takes ten times as long, a float32 one loses the small probabilities; here only the sum of
    one block is rounded to float32, which moves 1e-7 of its weight at most.
    """
    rows = torch.arange(len(weights), device=weights.device)
    blocks = pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # [R, V / BLOCK, BLOCK]
    ends = blocks.sum(-1).double().cumsum(-1)
    total = ends[:, -1]
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    block = (ends <= target[:, None]).sum(-1).clamp(max=ends.shape[-1] - 1)
    before = torch.where(block > 0, ends[rows, (block - 1).clamp(min=0)], 0.0)
    inner = blocks[rows, block].double()  # [R, BLOCK]
    inside = (inner.cumsum(-1) <= (target - before)[:, None]).sum(-1)
    last = ((inner > 0) * torch.arange(BLOCK, device=weights.device)).amax(-1)
    return block * BLOCK + torch.minimum(inside, last)


def draw(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability under the model itself: untempered, unfiltered, float32.

    logits [R, V]; uniforms [R] float64, of no effect when greedy. Filters apply in Hugging Face's order: temperature, top-k, top-p.
    Returns tokens [R] int64 and log-probabilities [R] float32.
    """
    logits = logits.float()
    if not sampling.biased:  # one pass over the vocabulary less; a token drawn by its own probability is never so rare as to underflow
        probabilities = logits.softmax(-1)
        tokens = inverse_cdf(probabilities, uniforms)
        return tokens, probabilities.gather(1, tokens[:, None])[:, 0].log()
    logprobs = logits.log_softmax(-1)
    tokens = logits.argmax(-1) if sampling.deterministic else inverse_cdf(_filtered(logprobs, sampling), uniforms)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _filtered(logprobs: Tensor, sampling: Sampling) -> Tensor:
    """[R, V] sampling weights."""
    scores = logprobs / sampling.temperature
    if sampling.top_k:
        scores = top_k_filter(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = top_p_filter(scores, sampling.top_p)
    return scores.softmax(-1)

"""Log-probabilities of given tokens: the plain path over logits, and its chunked twin over hidden states.

A logit matrix [N, V] is the largest tensor of a training step. The chunked path holds chunk x V logits at a time, keeps
two numbers a token for the backward pass, and recomputes the logits there. (The idea is common: see e.g. Cut Your Losses,
Wijmans et al. 2024, arXiv 2411.09009.) Where all of [N, V] is small, it is kept instead, and not computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from srppo.records import TokenScores

KEPT_BYTES = 64 * 2**20  # probabilities up to this size are kept for the backward pass
CHUNK_BYTES = {"cpu": 64 * 2**20}  # logits in memory at once: what a CPU's caches can still help with
OTHER_CHUNK_BYTES = 256 * 2**20  # on a GPU
FEWEST_ROWS = 256  # with fewer, reading the head's weights anew for each chunk costs more than its products


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: x = multiplier (h W^T + b), then softcap tanh(x / softcap) where softcap is set."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    multiplier: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] at once, float32 or wider. The product is in the model's (or autocast's) precision, all else in float32."""
        dtype = _product_dtype(hidden, self.weight)
        with torch.autocast(hidden.device.type, enabled=False):
            return _logits(hidden.to(dtype), self.weight.to(dtype), _cast(self.bias, dtype), self.softcap, self.multiplier)


def token_logprobs(logits: Tensor, ids: Tensor, entropy: bool = False) -> TokenScores:
    """log softmax(logits)[ids], and the entropy of softmax(logits) in nats if asked.

    logits [N, V] of any floating dtype, ids [N] int64. The log-softmax is taken in float32 (float64 logits stay float64).
    Logits of minus infinity (tokens ruled out) are allowed. Differentiable.
    """
    every = F.log_softmax(logits, dim=-1, dtype=_wide(logits.dtype))  # [N, V]
    chosen = every.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return TokenScores(chosen)
    finite = every.clamp(min=-1e4)  # where p is 0 by far: 0 * -inf would be NaN
    return TokenScores(chosen, -(every.exp() * finite).sum(-1))


def chunked_logprobs(hidden: Tensor, head: Head, ids: Tensor, *, chunk: int | None = None, entropy: bool = False) -> TokenScores:
    """token_logprobs(head.logits(hidden), ids) without holding [N, V], unless that is at most KEPT_BYTES and one chunk.

    hidden [N, H], ids [N] int64, chunk: rows of logits in memory at once (about chunk x V float32 forward and backward), by default
    `rows_at_once`.
    Gradients reach hidden, head.weight and head.bias, each only if it asks for one. Works under no_grad and autocast.
    Raises ValueError if chunk < 1.
    """
    if chunk is None:
        chunk = rows_at_once(head.weight.shape[0], hidden.device.type)
    if chunk < 1:
        raise ValueError(f"chunk is the number of rows in memory at once and must be at least 1, got {chunk}")
    dtype = _product_dtype(hidden, head.weight)
    chosen, spread = _ChunkedLogprobs.apply(hidden, head.weight, head.bias, ids, head.softcap, head.multiplier, chunk, entropy, dtype)
    return TokenScores(chosen, spread)


def rows_at_once(vocabulary: int, device: str) -> int:
    """How many rows of float32 logits of this width make a chunk: 64 MiB on a CPU, 256 MiB elsewhere, at least 256 rows."""
    return max(FEWEST_ROWS, CHUNK_BYTES.get(device, OTHER_CHUNK_BYTES) // (4 * vocabulary))


class _ChunkedLogprobs(torch.autograd.Function):
    """With z the logits, p = softmax(z), H its entropy, and g, e the gradients of the log-probability and of the entropy:

        d loss / d z_j = g (1[j = id] - p_j) + e (-p_j log p_j - p_j H)

    Forward walks over rows. Backward walks over blocks of the vocabulary of the same size, since the log-normaliser is known by
    then: so each row of the weight's gradient is written once, in its place, with no second [V, H] buffer and no sum of rounded parts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        softcap: float | None,
        multiplier: float,
        chunk: int,
        entropy: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        rows = hidden.shape[0]
        chosen = torch.empty(rows, dtype=_wide(dtype), device=hidden.device)
        normaliser = torch.empty_like(chosen)
        spread = torch.empty_like(chosen) if entropy else None
        small = rows <= chunk and rows * weight.shape[0] * chosen.element_size() <= KEPT_BYTES
        keep = small and softcap is None and any(ctx.needs_input_grad)
        ctx.probabilities = None
        with torch.autocast(hidden.device.type, enabled=False):
            product_weight, product_bias = weight.to(dtype), _cast(bias, dtype)
            for part in _slices(rows, chunk):
                z = _logits(hidden[part].to(dtype), product_weight, product_bias, softcap, multiplier)
                picked = z.gather(1, ids[part].unsqueeze(1)).squeeze(1)
                top = z.amax(1)
                p = z.sub_(top.unsqueeze(1)).exp_()  # in z's memory
                total = p.sum(1)
                normaliser[part] = top + total.log()
                chosen[part] = picked - normaliser[part]
                if spread is not None or keep:
                    p.div_(total.unsqueeze(1))
                if spread is not None:
                    spread[part] = torch.special.entr(p).sum(1)
                if keep:
                    ctx.probabilities = p
        ctx.save_for_backward(hidden, weight, bias, ids, normaliser, spread)
        ctx.softcap, ctx.multiplier, ctx.chunk, ctx.dtype = softcap, multiplier, chunk, dtype
        ctx.set_materialize_grads(False)
        return chosen, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_chosen: Tensor | None, grad_spread: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, normaliser, spread = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        dtype, wide = ctx.dtype, normaliser.dtype
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        kept, ctx.probabilities = ctx.probabilities, None  # changed in place below: a second backward pass recomputes
        block = vocabulary if kept is not None else min(vocabulary, max(1, ctx.chunk * vocabulary // max(rows, 1)))
        grad_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if want_hidden else None
        grad_weight = torch.empty_like(weight) if want_weight else None
        grad_bias = torch.empty_like(bias) if want_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            product_hidden = hidden.to(dtype)
            for part in _slices(vocabulary, block):
                part_weight = weight[part].to(dtype)
                part_bias = None if bias is None else bias[part].to(dtype)
                p, slope = kept, None  # [N, block]
                if p is None:
                    z = _logits(product_hidden, part_weight, part_bias, ctx.softcap, ctx.multiplier)
                    slope = None if ctx.softcap is None else 1 - (z / ctx.softcap) ** 2  # of softcap tanh(x / softcap)
                    p = z.sub_(normaliser.unsqueeze(1)).exp_()
                grad = _logit_gradient(p, ids - part.start, grad_chosen, grad_spread, spread)
                if slope is not None:
                    grad.mul_(slope)
                if ctx.multiplier != 1.0:
                    grad = grad.mul_(ctx.multiplier)
                if grad_bias is not None:
                    grad_bias[part] = grad.sum(0)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    if dtype == wide:
                        grad_hidden.addmm_(grad, part_weight)
                    else:
                        grad_hidden.add_(grad @ part_weight)
                if grad_weight is not None:
                    if grad_weight.dtype == dtype:
                        torch.mm(grad.t(), product_hidden, out=grad_weight[part])
                    else:
                        grad_weight[part] = grad.t() @ product_hidden
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None, None, None, None


def _logit_gradient(p: Tensor, local_ids: Tensor, grad_chosen: Tensor | None, grad_spread: Tensor | None, spread: Tensor | None) -> Tensor:
    """The gradient for a block of logits from its probabilities p [N, block], in p's memory where it can be.

    local_ids [N]: the chosen id counted from the block's start (outside [0, block) for a row whose token is elsewhere).
    """
    entropy_part = None
    if grad_spread is not None and spread is not None:
        entropy_part = torch.special.entr(p).sub_(p * spread.unsqueeze(1)).mul_(grad_spread.unsqueeze(1))
    if grad_chosen is None:
        p.zero_()
    else:
        p.mul_(-grad_chosen.unsqueeze(1))
        here = (local_ids >= 0) & (local_ids < p.shape[1])
        rows = here.nonzero().squeeze(1)
        p[rows, local_ids[rows]] += grad_chosen[rows]  # one entry a row, so no index is met twice
    return p if entropy_part is None else p.add_(entropy_part)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, multiplier: float) -> Tensor:
    z = F.linear(hidden, weight, bias)
    z = z.to(_wide(z.dtype))
    if multiplier != 1.0:
        z = z * multiplier
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The precision of h W^T: autocast's where it is on, else that of the tensors. A custom Function sees no autocast in its backward."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]

"""A linear layer with one LoRA adapter, y = W x + b + scale B A x, in as few passes over memory as it has products.

PEFT multiplies by scale and adds in passes of their own, forward and backward, over tensors as large as the layer's output;
here the small products are added into the large ones (addmm), and besides x only A x is kept for the backward pass.
N tokens, r rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


def install(layers: list[Any]) -> None:
    """Let PEFT's linear layers compute by `lora_linear` where that means the same; else they go on as they are."""
    for layer in layers:
        if type(layer) is LoraLinear and "forward" not in vars(layer):
            vars(layer)["forward"] = partial(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = None if args or kwargs else _plain_adapter(layer)
    if name is None:
        return LoraLinear.forward(layer, x, *args, **kwargs)
    base = layer.get_base_layer()
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    return lora_linear(x, weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def _plain_adapter(layer: Any) -> str | None:
    """The layer's one active adapter, if it is plain LoRA on a plain frozen layer and has no dropout to do."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return None
    name, base, dropout = active[0], layer.get_base_layer(), layer.lora_dropout[active[0]]
    odd = name in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(name)
    drops = layer.training and getattr(dropout, "p", 0.0) > 0
    if odd or drops or type(base) not in (nn.Linear, Conv1D) or base.weight.requires_grad:
        return None
    return str(name)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W x + bias + scale B A x (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    x [..., in], weight [out, in], bias [out], a [r, in], b [out, r]. Gradients reach x, a and b. The products are in autocast's
    precision where it is on, else in that of weight and x together; a and b are rounded to it, their gradients have their own.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.promote_types(x.dtype, weight.dtype)
    flat = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, a, b, scale, dtype)
    return flat.view(*x.shape[:-1], weight.shape[0])


class _LoraLinear(torch.autograd.Function):
    """With g the gradient of y:  dx = g W + scale (g B) A,  dA = scale (g B)^T x,  dB = scale g^T (A x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(dtype)
            low = wide @ a.to(dtype).t()  # [N, r]
            w = weight.to(dtype).t()
            y = wide @ w if bias is None else torch.addmm(bias.to(dtype), wide, w)
            y.addmm_(low, b.to(dtype).t(), alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale, ctx.dtype = scale, dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        scale, dtype = ctx.scale, ctx.dtype
        want_x, _, _, want_a, want_b = ctx.needs_input_grad[:5]
        grad_x = grad_a = grad_b = None
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.to(dtype)
            through = grad @ b.to(dtype)  # [N, r]
            if want_x:
                grad_x = grad @ weight.to(dtype)
                grad_x.addmm_(through, a.to(dtype), alpha=scale)
                grad_x = grad_x.to(x.dtype)
            if want_a:
                grad_a = (through.t() @ x.to(dtype)).mul_(scale).to(a.dtype)
            if want_b:
                grad_b = (low.t() @ grad).t().mul(scale).to(b.dtype)  # the wide product last: twice as fast as grad^T low on a CPU
        return grad_x, None, None, grad_a, grad_b, None, None

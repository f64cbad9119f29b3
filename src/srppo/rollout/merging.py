"""LoRA adapters merged into their base weights for as long as a rollout takes.

An adapter costs two more products for each linear layer and token: little arithmetic, but as many kernel calls again.
The base weights are frozen and shared by the other roles, so they are never written: the layer is lent another tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within, each layer with active plain LoRA adapters computes with one weight, W + sum of scale B A.

    Afterwards, also by an exception, every layer has its own weight again, the same object with the same bits, and its adapters.
    Costs the memory of one more copy of the adapted weights. Layers that are adapted in other ways (DoRA, quantized, embeddings,
    biases) go on as they are, and so do those whose W is in half precision, in which the sum would lose most of a small change.
    Nothing else may switch adapters within, and training the adapters must wait.
    """
    from peft.tuners.lora.layer import Linear as LoraLinear

    lent: list[tuple[Any, Any, nn.Parameter]] = []
    try:
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, LoraLinear) and _plain(layer):
                    base: Any = layer.get_base_layer()
                    lent.append((layer, base, base.weight))
                    base._parameters["weight"] = nn.Parameter(_sum(layer, base.weight.detach()), requires_grad=False)
                    layer._disable_adapters = True
        yield
    finally:
        for layer, base, own in lent:
            base._parameters["weight"] = own
            layer._disable_adapters = False


def _sum(layer: Any, weight: Tensor) -> Tensor:
    """W + sum of scale B A over the active adapters, in W's precision: a new tensor, made in one pass each."""
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            a, b = (half[adapter].weight.to(weight.dtype) for half in (layer.lora_A, layer.lora_B))
            factors = (a.t(), b.t()) if layer.fan_in_fan_out else (b, a)
            weight = torch.addmm(weight, *factors, alpha=layer.scaling[adapter])
    return weight


def _plain(layer: Any) -> bool:
    """Whether the layer's active adapters do W x + scale B A x, and nothing else."""
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    odd = any(a in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(a) for a in active)
    base = layer.get_base_layer()
    wide = type(base) in (nn.Linear, Conv1D) and base.weight.dtype in (torch.float32, torch.float64)
    return bool(active) and wide and not (odd or layer.disable_adapters or layer.merged)

"""Our LoRA layer against PEFT's, forward and backward, and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from srppo.models.lora_linear import install, lora_linear


def layer(kind: str = "linear", dropout: float = 0.0, bias: bool = True) -> Any:
    torch.manual_seed(0)
    base = Conv1D(7, 5) if kind == "conv1d" else nn.Linear(5, 7, bias=bias)
    base.requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, fan_in_fan_out=kind == "conv1d", init_lora_weights=False)
    made = LoraLinear(base, "one", config=config, r=3, lora_alpha=6)
    made.update_layer("two", 3, lora_alpha=3, config=config)
    made.set_adapter("one")
    return made


def outcome(made: Any, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    made.zero_grad()
    y = made(x)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in made.parameters())]


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_equals_peft_forward_and_backward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(kind), torch.randn(2, 4, 5)
    theirs = {}
    for adapter in ("one", "two"):
        made.set_adapter(adapter)
        theirs[adapter] = outcome(made, x)
    install([made])
    plain = []
    monkeypatch.setattr(LoraLinear, "forward", lambda *_: plain.append(1))  # what is compared is ours
    for adapter in ("one", "two"):
        made.set_adapter(adapter)
        torch.testing.assert_close(outcome(made, x), theirs[adapter], atol=2e-6, rtol=1e-5)
    assert not plain


def test_goes_to_peft_for_what_it_does_not_do() -> None:
    """Adapters off, merged, several at once, dropout in training, another variant: PEFT's own result, bit for bit."""
    x = torch.randn(4, 5)

    def cases(made: Any) -> list[Tensor]:
        out = []
        made.train()
        torch.manual_seed(1)
        out.append(made(x))
        made.eval()
        made.enable_adapters(False)
        out.append(made(x))
        made.enable_adapters(True)
        made.set_adapter(["one", "two"])
        out.append(made(x))
        made.set_adapter("one")
        made.merge()
        return [*out, made(x)]

    ours = layer(dropout=0.5)
    install([ours])
    assert all(torch.equal(a, b) for a, b in zip(cases(layer(dropout=0.5)), cases(ours), strict=True))


def test_gradients_by_finite_differences() -> None:
    g = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (2, 5), (7, 2)))
    weight, bias = torch.randn(7, 5, generator=g, dtype=torch.float64), torch.randn(7, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 1.5), (x, a, b))


def test_autocast_computes_in_bfloat16_and_keeps_the_adapters_precision() -> None:
    made = layer()
    install([made])
    x = torch.randn(6, 5)
    exact = outcome(made, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = outcome(made, x)
    assert rough[0] is not None and rough[0].dtype == torch.bfloat16
    assert all(r is None or r.dtype == torch.float32 for r in rough[1:])
    for e, r in zip(exact, rough, strict=True):
        assert (e is None) == (r is None)
        if e is not None and r is not None:
            assert 0 < (e - r.float()).abs().max() < 0.05 * e.abs().max()

"""model.kernels: liger, with stand-ins for Liger and for the GPU: what is checked before its layers are trusted."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from srppo.config import ModelConfig
from srppo.errors import ModelError
from srppo.models.kernels import use_liger
from srppo.models.load import load_model
from tiny_models import save_tiny

GPU = torch.device("cuda")


class TwiceForward(torch.autograd.Function):
    """The right norm, and twice its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 2 * grad


def liger(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], None]) -> list[dict[str, Any]]:
    """A liger_kernel whose entry point calls `change` on the model. Returns what it was called with."""
    calls: list[dict[str, Any]] = []

    def apply(model: nn.Module, **options: Any) -> None:
        calls.append(options)
        change(model)

    package, transformers = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    vars(transformers)["_apply_liger_kernel_to_instance"] = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    return calls


def norms(model: nn.Module) -> list[Any]:
    return [m for name, m in model.named_modules() if name.endswith("layernorm")]


def by_hand(model: nn.Module) -> None:
    """The same RMS norm by another formula, bound to the instances as Liger does."""
    for norm in norms(model):
        norm.forward = types.MethodType(lambda n, x: nn.functional.rms_norm(x, x.shape[-1:], n.weight, n.variance_epsilon), norm)


def wrong_states(model: nn.Module) -> None:
    for norm in norms(model):
        norm.forward = lambda x, n=norm: 1.01 * nn.functional.rms_norm(x, x.shape[-1:], n.weight, n.variance_epsilon)


def wrong_gradients(model: nn.Module) -> None:
    for norm in norms(model):
        norm.forward = lambda x, n=norm: TwiceForward.apply(nn.functional.rms_norm(x, x.shape[-1:], n.weight, n.variance_epsilon))


def test_layers_that_agree_are_used_and_its_losses_are_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = liger(monkeypatch, by_hand)
    model = load_model(ModelConfig(name=save_tiny(tmp_path / "llama")))
    flags = [p.requires_grad for p in model.parameters()]
    use_liger(model, GPU)
    assert calls == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
    assert all("forward" in vars(norm) for norm in norms(model))
    twin = copy.deepcopy(model)  # as full tuning makes its roles: the copy's layers have the copy's weights
    ids = torch.arange(4)[None]
    before = twin(ids).logits
    norms(model)[0].weight.data.mul_(3.0)
    assert torch.equal(twin(ids).logits, before) and not torch.equal(model(ids).logits, before)
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("change", "what"), [(wrong_states, "states"), (wrong_gradients, "gradients"), (lambda m: None, "no kernels")])
def test_layers_that_disagree_are_refused(
    change: Callable[[nn.Module], None], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger(monkeypatch, change)
    model = load_model(ModelConfig(name=save_tiny(tmp_path / "llama")))
    with pytest.raises(ModelError, match=what):
        use_liger(model, GPU)


def test_without_a_gpu_or_the_package_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = save_tiny(tmp_path / "llama")
    with pytest.raises(ModelError, match=r"needs a GPU.*plain"):
        load_model(ModelConfig(name=place, kernels="liger", device="cpu"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'srppo\[liger\]'"):
        use_liger(load_model(ModelConfig(name=place)), GPU)

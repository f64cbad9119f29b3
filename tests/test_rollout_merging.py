"""Merged adapters against adapters, and base weights that are the same objects with the same bits afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from srppo.rollout.engine import Sampling
from srppo.rollout.merging import merged
from srppo.rollout.torch_engine import TorchEngine
from tiny_models import tiny_model

IDS = torch.arange(12, 24)[None]


@dataclass(frozen=True)
class Special:
    pad_id: int = 0
    eos_ids: tuple[int, ...] = (3, 7, 11)


def adapted(name: str = "llama", **settings: Any) -> Any:
    model = tiny_model(name)
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False, "fan_in_fan_out": name == "gpt2"}
    return get_peft_model(model, LoraConfig(**{**options, **settings})).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_is_the_adapted_model(name: str) -> None:
    model = adapted(name)
    inner = model.get_base_model()
    objects = {n: (p, p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in inner.named_parameters()}
    with torch.no_grad():
        expected = inner(IDS).logits
        with model.disable_adapter():
            base = inner(IDS).logits
        with merged(inner):
            adapters = [m for m in inner.modules() if hasattr(m, "lora_A") and not m.disable_adapters]
            torch.testing.assert_close(inner(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        assert (expected - base).abs().max() > 0.1 and not adapters
        assert torch.equal(inner(IDS).logits, expected)
    for n, p in inner.named_parameters():
        own, place, bits, grad = objects[n]
        assert p is own and p.data_ptr() == place and torch.equal(p, bits) and p.requires_grad == grad


def test_put_back_after_an_exception() -> None:
    model = adapted().get_base_model()
    parameters = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert not any(m.disable_adapters for m in model.modules() if hasattr(m, "lora_A"))


def test_what_is_left_alone() -> None:
    """Adapters that are off, changes that are no plain sum, and half precision, in which a small change would be lost."""
    off, dora, half = adapted(), adapted(use_dora=True).get_base_model(), adapted().get_base_model().to(torch.bfloat16)
    with off.disable_adapter():
        assert not _changed(off.get_base_model())
        with merged(off.get_base_model()):
            assert all(m.disable_adapters for m in off.modules() if hasattr(m, "lora_A"))
        assert all(m.disable_adapters for m in off.modules() if hasattr(m, "lora_A"))
    assert not _changed(dora) and not _changed(half) and not _changed(tiny_model())
    assert _changed(off.get_base_model())


def _changed(model: Any) -> bool:
    before = list(model.parameters())
    with merged(model):
        return any(a is not b for a, b in zip(before, model.parameters()))


def test_the_engine_merges_for_the_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    seen: list[bool] = []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda *args: seen.append(layer.disable_adapters))
    prompts = [[20, 21, 22], [30], [40, 41]] * 4
    merged_rollout = TorchEngine(Special(), 4).generate(model, prompts, range(12), Sampling(12))
    assert all(seen) and seen
    seen.clear()
    apart = TorchEngine(Special(), 4, merge_adapters=False).generate(model, prompts, range(12), Sampling(12))
    assert not any(seen) and torch.equal(apart.responses, merged_rollout.responses)
    torch.testing.assert_close(apart.behaviour_logprobs, merged_rollout.behaviour_logprobs, atol=1e-4, rtol=0)
    with model.disable_adapter():
        base = TorchEngine(Special(), 4).generate(model, prompts, range(12), Sampling(12))
    assert not torch.equal(base.behaviour_logprobs, apart.behaviour_logprobs)

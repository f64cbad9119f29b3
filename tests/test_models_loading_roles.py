"""Roles from checkpoints: what fits, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from srppo.errors import ModelError
from srppo.models.roles import Roles
from tiny_models import ARCHITECTURES, save_tiny, tiny_model, tiny_roles, tiny_tokenizer

IDS = torch.arange(7, 37).reshape(2, 15)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {a: save_tiny(root / a, a) for a in [*ARCHITECTURES, "llama_tied", "cohere"]}


def moved(place: str, kind: str, **settings: Any) -> Roles:
    """Roles whose policy is away from base."""
    roles = tiny_roles(place, kind, **settings)  # type: ignore[arg-type]
    roles.create("policy", "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in roles.parameters("policy").values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return roles


def logits(roles: Roles, role: str) -> torch.Tensor:
    with roles.use(role) as model:
        return model(input_ids=IDS).logits


def test_the_wrong_kind_of_checkpoint_is_refused(places: dict[str, str], tmp_path: Path) -> None:
    full, lora = moved(places["llama"], "full"), moved(places["llama"], "lora")
    full.save("policy", tmp_path / "full")
    lora.save("policy", tmp_path / "lora")
    with pytest.raises(ModelError, match=r"this is an adapter, but tuning.kind is full"):
        full.load("sft", tmp_path / "lora")
    with pytest.raises(ModelError, match=r"whole model, but tuning.kind is lora"):
        lora.load("sft", tmp_path / "full")
    with pytest.raises(ModelError, match=r"this is an adapter, not a model.*sft.checkpoint"):
        tiny_roles(tmp_path / "lora")
    with pytest.raises(ModelError, match="base is not changed by LoRA"):
        lora.save("base", tmp_path / "base")
    assert full.names() == lora.names() == {"base", "policy"} and not (tmp_path / "base").exists()


def test_another_vocabulary_is_refused(places: dict[str, str], tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["hello"])
    save_tiny(tmp_path / "words", tokenizer=other, vocabulary=104)
    save_tiny(tmp_path / "rows", vocabulary=128)
    roles = tiny_roles(places["llama"])
    with pytest.raises(ModelError, match="base and sft have different vocabularies"):
        roles.load("sft", tmp_path / "words")
    with pytest.raises(ModelError, match="base embeds 103 tokens and sft 128"):
        roles.load("sft", tmp_path / "rows")
    assert roles.names() == {"base"}
    adapter = moved(places["llama"], "lora")
    adapter.save("policy", tmp_path / "adapter")
    other.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="different vocabularies"):
        adapter.load("sft", tmp_path / "adapter")
    assert adapter.names() == {"base", "policy"}


def test_an_sft_of_another_architecture_scores_right(places: dict[str, str]) -> None:
    """Same vocabulary, other network: full tuning does not mind, and must not reuse base's plan."""
    roles = tiny_roles(places["llama"])
    roles.load("sft", places["cohere"])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(places["cohere"])(IDS).logits.log_softmax(-1)[:, :-1]
    from srppo.records import TokenBatch

    target = torch.ones_like(IDS, dtype=torch.bool)
    target[:, 0] = False
    scores = roles.score("sft", TokenBatch(IDS, torch.ones_like(IDS), target)).logprobs
    torch.testing.assert_close(scores, expected.gather(-1, IDS[:, 1:, None]).flatten(), atol=1e-5, rtol=0)


def test_adapters_that_cannot_share_the_base_are_refused(places: dict[str, str], tmp_path: Path) -> None:
    roles = moved(places["llama"], "lora")
    for name, config, message in (
        ("bias", LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "trains biases"),
        ("modules", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
        ("tokens", LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3]), "trainable_token_indices"),
    ):
        get_peft_model(tiny_model(), config).save_pretrained(tmp_path / name)
        with pytest.raises(ModelError, match=message):
            roles.load("sft", tmp_path / name)
    raw = json.loads((tmp_path / "bias/adapter_config.json").read_text()) | {"peft_type": "PREFIX_TUNING"}
    (tmp_path / "bias/adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="PREFIX_TUNING adapter"):
        roles.load("sft", tmp_path / "bias")
    assert roles.names() == {"base", "policy"}


def test_adapters_made_elsewhere_load(places: dict[str, str], tmp_path: Path) -> None:
    """Of another rank, on fewer layers, by PEFT itself."""
    base = AutoModelForCausalLM.from_pretrained(places["llama"])
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_B" in n:
                p.normal_()
        expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    roles = moved(places["llama"], "lora")
    mine = logits(roles, "policy")
    roles.load("sft", tmp_path / "theirs")
    roles.create("copy", "sft")
    for role, theirs in (("sft", expected), ("copy", expected), ("policy", mine)):
        torch.testing.assert_close(logits(roles, role), theirs, atol=2e-6, rtol=1e-5)  # our layer sums in another order than PEFT's
    assert torch.equal(logits(roles, "sft"), logits(roles, "copy"))
    with torch.no_grad():
        assert torch.equal(logits(roles, "base"), AutoModelForCausalLM.from_pretrained(places["llama"])(IDS).logits)


def test_adapters_of_another_model(places: dict[str, str], tmp_path: Path) -> None:
    wide = save_tiny(tmp_path / "wide", hidden_size=64)
    moved(wide, "lora").save("policy", tmp_path / "a")
    moved(places["gpt2"], "lora").save("policy", tmp_path / "b")
    deep = save_tiny(tmp_path / "deep", num_hidden_layers=3)
    moved(deep, "lora").save("policy", tmp_path / "d")
    roles = moved(places["llama"], "lora")
    before = logits(roles, "policy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for folder in ("a", "b", "d"):
            with pytest.raises(ModelError, match=r"does not fit|another model"):
                roles.load("sft", tmp_path / folder)
        with pytest.raises(ModelError, match="another model"):  # the other way round: layers of the base without weights
            tiny_roles(save_tiny(tmp_path / "deeper", num_hidden_layers=4), "lora").load("sft", tmp_path / "d")
    assert roles.names() == {"base", "policy"} and torch.equal(logits(roles, "policy"), before)
    same_shape = save_tiny(tmp_path / "twin", seed=5)
    moved(same_shape, "lora").save("policy", tmp_path / "c")
    with pytest.warns(UserWarning, match=r"says it was trained on .*twin"):
        roles.load("sft", tmp_path / "c")


def test_pickled_adapters_are_refused_unless_allowed(places: dict[str, str], tmp_path: Path) -> None:
    roles = moved(places["llama"], "lora")
    roles.save("policy", tmp_path / "out")
    torch.save(load_file(tmp_path / "out/adapter_model.safetensors"), tmp_path / "out/adapter_model.bin")
    (tmp_path / "out/adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pickled.*model.allow_pickle"):
        roles.load("sft", tmp_path / "out")
    allowed = tiny_roles(places["llama"], "lora", allow_pickle=True)
    allowed.load("sft", tmp_path / "out")
    assert torch.equal(logits(allowed, "sft"), logits(roles, "policy"))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ModelError, match="no such file or folder"):
        roles.load("sft", tmp_path / "out")

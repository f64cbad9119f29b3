"""What is handed to vLLM: against PEFT's own merging and loading. Needs no vLLM."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from srppo.files import current_umask
from srppo.rollout.vllm_handover import write_weights
from srppo.rollout.vllm_weights import Mark, TiedAdapter, active_adapter, named_weights, plain_tensors, write_config
from tiny_models import save_tiny, standard_roles, tiny_batch, tiny_model, train_role


def adapted(architecture: str = "llama", **lora: Any) -> tuple[PeftModel, Any]:
    """A model with a random adapter, and the transformers model inside."""
    model = tiny_model(architecture)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(model, LoraConfig(**{**settings, "fan_in_fan_out": architecture == "gpt2", **lora})).eval()
    return wrapped, model


def new_files_permissions(folder: Path) -> bool:
    """Whether all files have them: the server may be another user's."""
    return {stat.S_IMODE(os.stat(f).st_mode) for f in folder.iterdir()} == {0o666 & ~current_umask()}


def test_a_mark_sees_every_change_of_a_run(tmp_path: Path) -> None:
    roles = standard_roles(save_tiny(tmp_path / "m"), "full")
    with roles.use("policy") as model:
        mark = Mark(plain_tensors(model).values())
        assert mark.holds(plain_tensors(model).values())
    state = roles.state("policy")
    roles.score("policy", tiny_batch())
    with roles.use("policy") as model:
        assert mark.holds(plain_tensors(model).values())  # reading changes nothing
    train_role(roles, "policy")
    with roles.use("policy") as model:
        assert not mark.holds(plain_tensors(model).values())
        mark = Mark(plain_tensors(model).values())
    roles.load_state("policy", state)
    with roles.use("policy") as model:
        assert not mark.holds(plain_tensors(model).values())
    with roles.use("sft") as model:  # equal values, other tensors
        assert not mark.holds(plain_tensors(model).values())


@pytest.mark.parametrize("foreach, fused", [(False, False), (True, False), (False, True)])
def test_a_mark_sees_every_kind_of_optimizer(foreach: bool, fused: bool) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=foreach, fused=fused)
    mark = Mark(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert mark.holds(model.parameters())
    optimizer.step()
    assert not mark.holds(model.parameters())
    mark = Mark(model.parameters(), "one")
    assert mark.holds(model.parameters(), "one") and not mark.holds(model.parameters(), "two")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert not mark.holds(model.parameters(), "one")


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "gpt2", "qwen2"])
def test_merged_weights_are_pefts(architecture: str) -> None:
    wrapped, model = adapted(architecture)
    plain = {n: t.clone() for n, t in tiny_model(architecture).state_dict().items()}
    adapter = active_adapter(model)
    assert adapter is not None and adapter.rank == 4 and adapter.names == ("default",)
    merged, unmerged = named_weights(model, adapter), named_weights(model)
    assert unmerged.keys() == plain.keys() and all(torch.equal(unmerged[n], plain[n]) for n in plain)
    with wrapped.disable_adapter():
        assert active_adapter(model) is None
    expected = wrapped.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=0)
    assert sum(not torch.equal(merged[n], plain[n]) for n in plain) > 3


def test_a_written_adapter_is_the_adapter(tmp_path: Path) -> None:
    wrapped, model = adapted(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5})
    adapter = active_adapter(model)
    assert adapter is not None and adapter.servable and adapter.rank == 4
    adapter.write(tmp_path / "adapter")
    assert new_files_permissions(tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert said["lora_alpha"] == said["r"] == 4  # the scales are in B
    ids = tiny_batch().ids
    expected = wrapped(input_ids=ids).logits
    merged = tiny_model()
    for name, delta in deltas(tmp_path / "adapter").items():  # by hand: W + B A
        merged.get_submodule(name).weight.data += delta
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
    assert (expected - tiny_model()(input_ids=ids).logits).abs().max() > 0.1


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    names = {n.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for n in tensors}
    key = "base_model.model.{}.lora_{}.weight"
    return {n: tensors[key.format(n, "B")] @ tensors[key.format(n, "A")] for n in names}


def test_what_vllm_could_not_serve_is_merged_or_refused() -> None:
    assert not active_adapter(adapted("gpt2")[1]).servable  # type: ignore[union-attr]  # Conv1D
    assert not active_adapter(adapted(target_modules=["lm_head"])[1]).servable  # type: ignore[union-attr]
    model = adapted(target_modules=["embed_tokens"])[1]
    assert not active_adapter(model).servable  # type: ignore[union-attr]
    assert named_weights(model, active_adapter(model))["model.embed_tokens.weight"].shape == (103, 32)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        tied = adapted("llama_tied", target_modules=["lm_head"])[1]
    with pytest.raises(TiedAdapter):
        named_weights(tied, active_adapter(tied))


def test_a_written_model_is_the_model(tmp_path: Path) -> None:
    for architecture in ("llama_tied", "gpt2"):
        model = tiny_model(architecture, seed=3)
        write_weights(model, None, tmp_path / architecture)
        assert new_files_permissions(tmp_path / architecture)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / architecture).eval()
        ids = tiny_batch().ids
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    write_config(model, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["GPT2LMHeadModel"]
    assert model.config.architectures is None  # the model's own is left alone

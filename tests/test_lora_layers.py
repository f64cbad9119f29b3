"""Adapters on the last layers only: what is below is run once a rollout, and nothing comes out otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from srppo.errors import ModelError
from srppo.models.lora_roles import LoraRoles
from srppo.models.over_rollout import micro_batches, prefixes, role_logprobs
from srppo.models.roles import Roles
from srppo.records import Rollout
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from tiny_job import metrics, run, tiny_job, weights, without_clock
from tiny_models import save_tiny, standard_roles

OFF: dict[str, Any] = {"diagnose__enabled": False, "guard__every": 0, "evaluation__continued_sft": False}


def shallow(folder: Path, architecture: str = "llama", **lora: Any) -> tuple[Roles, Rollout]:
    roles = standard_roles(save_tiny(folder / architecture, architecture), "lora", lora={"lora_layers": 1, **lora})
    with roles.use("sft") as model:
        rollout = TorchEngine(roles.special, 8).generate(model, [[5, 6], [7], [8, 9, 10], [11, 12]], range(4), Sampling(6))
    return roles, rollout


@pytest.mark.parametrize(("architecture", "depth"), [("llama", 1), ("qwen3", 1), ("mistral", 1), ("gemma3", 2), ("gpt2", 0)])
def test_scores_and_gradients_are_those_without_prefixes(architecture: str, depth: int, tmp_path: Path) -> None:
    """GPT-2 adds its position embeddings to what it takes for token embeddings, so it cannot be entered from the middle: noticed."""
    roles, rollout = shallow(tmp_path, architecture)
    assert roles.prefix_depth == depth
    below = prefixes(roles, rollout, 20)
    assert (below is None) == (depth == 0)
    for role in ("base", "sft", "policy"):
        torch.testing.assert_close(
            role_logprobs(roles, role, rollout, 20, below), role_logprobs(roles, role, rollout, 20), atol=5e-6, rtol=0
        )
    if below is None:
        return
    outcomes = []
    for given in (below, None):
        found = {}
        for (_, batch), name in zip(micro_batches(roles, rollout, 20, prefixes=given), "abcdef"):
            for kind, value in (("policy", roles.score("policy", batch, train=True).logprobs), ("critic", roles.values(batch, train=True))):
                (value * torch.linspace(-1, 2, len(value))).sum().backward()
                found[f"{kind} {name}"] = value.detach()
        for parameters in (roles.parameters("policy"), roles.critic_parameters()):
            found |= {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
            for p in parameters.values():
                p.grad = None
        outcomes.append(found)
    assert len(outcomes[0]) > 20
    torch.testing.assert_close(outcomes[0], outcomes[1], atol=2e-5, rtol=1e-3)


def test_the_layers_below_are_run_once_for_all_roles_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_job(tmp_path, kind="lora", tuning__lora_layers=1, ppo__iterations=2, ppo__critic_warmup=0, **OFF)
    calls: dict[str, int] = {"below": 0, "above": 0}
    use = LoraRoles.use

    def counting(self: LoraRoles, role: str, train: bool) -> Any:
        layers = self._model.get_decoder().layers
        for name, layer in zip(calls, layers):
            if not layer._forward_pre_hooks and len(layers) == 2:
                layer.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: calls.update({name: calls[name] + (kwargs.get("past_key_values") is None)}),
                    with_kwargs=True,
                )
        return use(self, role, train)

    monkeypatch.setattr(LoraRoles, "use", counting)
    run(config)
    # a round: base, sft, critic, and policy and critic in 2 epochs x 2 minibatches; and one for the trial of the first round
    assert calls["above"] - calls["below"] == 2 * (3 + 2 * 4) + 1


@pytest.mark.parametrize("lora_targets", ["all-linear", ["q_proj", "down_proj"], r".*\.(q|v)_proj"])
def test_only_the_last_layers_are_adapted_and_load_in_peft(lora_targets: str | list[str], tmp_path: Path) -> None:
    roles, _ = shallow(tmp_path, lora_targets=lora_targets)
    names = list(roles.parameters("policy"))
    assert names and all(".layers.1." in n for n in names)
    roles.save("policy", tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), roles.use("policy") as model:
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-6, rtol=1e-5)


def test_a_job_with_prefixes_is_the_job_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"tuning__lora_layers": 1, "ppo__adam_epsilon": 1e-6, "sft__adam_epsilon": 1e-6, "ppo__iterations": 2, **OFF}
    run(tiny_job(tmp_path, kind="lora", output=str(tmp_path / "with"), **changes))
    monkeypatch.setattr(LoraRoles, "prefix_depth", lambda self: 0)
    run(tiny_job(tmp_path, kind="lora", output=str(tmp_path / "without"), **changes))
    ends = [weights(tmp_path / name / "policy") for name in ("with", "without")]
    assert ends[0].keys() == ends[1].keys() and all(".1." in name for name in ends[0])
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=5e-6)
    kl = [[r["objective/kl"] for r in without_clock(metrics(tmp_path / name))] for name in ("with", "without")]
    assert kl[0] == pytest.approx(kl[1], abs=1e-4)


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tuning.lora_layers is 3, but .* has 2 decoder layers"):
        shallow(tmp_path, lora_layers=3)

"""A critic that is a head on the SFT model's states: the values of a critic with a trunk that never moved, at no passes of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srppo.config import build
from srppo.models.over_rollout import micro_batches
from srppo.models.roles import Roles
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.train.compute import Compute
from srppo.train.experience import score
from srppo.train.interrupt import Interrupted
from tiny_job import StopAt, metrics, run, tiny_job, weights, without_clock
from tiny_models import save_tiny, tiny_roles, train_role


def headed(place: str, kind: str, trunk: bool) -> Roles:
    roles = tiny_roles(place, kind)  # type: ignore[arg-type]
    roles.create("sft", "base")
    train_role(roles, "sft", steps=2)
    roles.create("policy", "sft")
    roles.create_critic("sft", trunk=trunk)
    roles.freeze("sft")
    with torch.no_grad():
        head = roles.critic_parameters()["value_head.weight"]
        head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))
    return roles


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_values_and_the_heads_gradient_are_those_of_a_trunk_that_stands_still(kind: str, tmp_path: Path) -> None:
    place, config = save_tiny(tmp_path / "llama"), build({"ppo": {"micro_batch_tokens": 30}})
    own, head = headed(place, kind, True), headed(place, kind, False)
    assert list(head.critic_parameters()) == ["value_head.weight", "value_head.bias"] and "critic" not in head._store.names()
    with own.use("sft") as model:
        rollout = TorchEngine(own.special, 8).generate(model, [[5, 6], [7], [8, 9, 10]], range(3), Sampling(6))
    compute = Compute(), Compute()
    expected, found = (score(roles, rollout, config, spent) for roles, spent in zip((own, head), compute))
    torch.testing.assert_close(found.values, expected.values, atol=2e-6, rtol=1e-5)
    assert found.values.abs().max() > 0.1 and expected.states is None and found.states is not None
    assert [len(s) for s in found.states] == rollout.lengths.tolist()
    torch.testing.assert_close(found.lp_sft, expected.lp_sft)
    assert compute[0].forward_tokens * 2 == compute[1].forward_tokens * 3  # base, sft and a critic; base and sft
    gradients = []
    ((_, batch),) = micro_batches(own, rollout, 1000, [2, 0])
    for roles, values in ((own, own.values(batch, train=True)), (head, head.values_of(torch.cat([found.states[r] for r in (2, 0)])))):
        (values * torch.linspace(-1, 2, len(values))).sum().backward()
        gradients.append(roles.critic_parameters()["value_head.weight"].grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_job_with_a_head_resumes_exactly_and_saves_only_the_head(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_job(tmp_path, kind=kind, tuning__critic="head", diagnose__enabled=False, guard__every=0, ppo__iterations=4)
    whole = config.model_copy(update={"output": str(tmp_path / "whole")})
    run(whole)
    with monkeypatch.context() as patch:
        patch.setattr("srppo.workspace.Interrupt", lambda: StopAt(30))
        with pytest.raises(Interrupted):
            run(config)
    run(config, resume=True)
    ends = [
        weights(tmp_path / name / "policy") | load_file(tmp_path / name / "critic" / "value_head.safetensors") for name in ("run", "whole")
    ]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert without_clock(metrics(tmp_path / "run")) == without_clock(metrics(tmp_path / "whole"))
    assert {p.name for p in (tmp_path / "run" / "critic").iterdir()} == {"README.md", "value_head.safetensors", "value_scale.json"}
    assert "no trunk" in (tmp_path / "run" / "critic" / "README.md").read_text()
    last = metrics(tmp_path / "run")[-1]
    assert ends[0]["weight"].abs().min() > 0 and "policy/entropy_avg" not in last  # learned from zeros; not asked for

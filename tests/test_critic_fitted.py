"""A critic without a trunk in a run: it reads the SFT model's states from the scoring pass, and is fitted to each round for the next."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from srppo.config import build
from srppo.errors import ModelError
from srppo.models.roles import Roles
from srppo.records import Experience, Features, Rollout
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.train.compute import Compute
from srppo.train.experience import decided_so_far, score
from srppo.train.interrupt import Interrupted
from srppo.train.update import fit_critic
from tiny_job import StopAt, metrics, run, tiny_job, weights, without_clock
from tiny_models import save_tiny, tiny_roles, train_role


def critic_of(place: str, kind: Literal["full", "lora"], trunk: bool) -> Roles:
    roles = tiny_roles(place, kind)
    roles.create("sft", "base")
    train_role(roles, "sft", steps=2)
    roles.create("policy", "sft")
    roles.create_critic("sft", trunk=trunk)
    roles.freeze("sft")
    return roles


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_values_are_those_of_the_same_head_on_a_trunk_that_stands_still(kind: Literal["full", "lora"], tmp_path: Path) -> None:
    place, config = save_tiny(tmp_path / "llama"), build({"ppo": {"micro_batch_tokens": 30}})
    own, fitted = critic_of(place, kind, True), critic_of(place, kind, False)
    assert fitted.has_critic and fitted.critic_parameters() == {} and "critic" not in fitted._store.names()
    with own.use("sft") as model:
        rollout = TorchEngine(own.special, 8).generate(model, [[5, 6], [7], [8, 9, 10]], range(3), Sampling(6))
    begun = score(fitted, rollout, config, Compute())
    assert begun.features is not None and begun.values.eq(0).all()  # nothing known yet
    returns = [torch.randn(int(n), generator=torch.Generator().manual_seed(int(n))) for n in rollout.lengths]
    assert fitted.fit_critic(begun.features, [2, 0, 1], returns)
    fitted.save_critic(tmp_path / "critic")
    with torch.no_grad():
        for name, saved in load_file(tmp_path / "critic" / "value_head.safetensors").items():
            own.critic_parameters()[f"value_head.{name}"].copy_(saved[:, :-1] if name == "weight" else saved)
    last = float(load_file(tmp_path / "critic" / "value_head.safetensors")["weight"][0, -1])  # of the log-ratio so far
    compute = Compute(), Compute()
    expected, found = (score(roles, rollout, config, spent) for roles, spent in zip((own, fitted), compute))
    so_far = torch.tensor([[float((found.lp_reward - found.lp_base)[b, :t].sum()) for t in range(rollout.mask.shape[1])] for b in range(3)])
    torch.testing.assert_close(found.values, (expected.values + last * so_far) * rollout.mask, atol=1e-4, rtol=1e-3)
    assert found.values.abs().max() > 0.1 and expected.features is None and found.features is not None
    assert [len(s) for s in found.features.states] == rollout.lengths.tolist()
    torch.testing.assert_close(found.lp_sft, expected.lp_sft)
    assert compute[0].forward_tokens * 2 == compute[1].forward_tokens * 3  # base, sft and a critic; base and sft


def test_rows_left_out_of_the_loss_take_no_part_in_the_fit(tmp_path: Path) -> None:
    """Three rows, the middle one left out: the fit is that of the other two, whatever the middle one holds."""
    lengths, g = [3, 2, 4], torch.Generator().manual_seed(0)
    mask = torch.tensor([[t < n for t in range(4)] for n in lengths])
    rollout = Rollout([[5]] * 3, [0, 1, 2], torch.ones(3, 4, dtype=torch.int64), mask, torch.zeros(3, 4), torch.ones(3, dtype=torch.bool))
    zeros, returns = torch.zeros(3, 4), torch.randn(3, 4, generator=g)
    states = [torch.randn(n, 16, generator=g, dtype=torch.float32).bfloat16() for n in lengths]
    keep, found = torch.tensor([True, False, True]), []
    for middle in (1.0, float("nan")):
        roles = critic_of(save_tiny(tmp_path / "llama"), "full", False)
        width = roles._least_squares().ridged
        features = Features([s.repeat(1, width // 16 + 1)[:, :width] for s in states], [torch.arange(float(n)) for n in lengths])
        features.states[1].fill_(middle)
        experience = Experience(rollout, zeros, zeros, zeros, returns, keep, features)
        metrics = fit_critic(roles, experience, warn=pytest.fail)
        expected = torch.cat([returns[0, :3], returns[2]]).square().mean() / 2
        assert metrics["loss/value_avg"] == pytest.approx(float(expected))
        found.append({name: t.clone() for name, t in roles._least_squares().tensors().items()})
    assert float(found[0]["totals"][0]) == 7 and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_a_round_without_a_row_that_counts_changes_nothing_and_says_nothing(tmp_path: Path) -> None:
    """Every response cut at the limit and left out: as with a trained critic, the run goes on, and no figure is NaN."""
    options = {"reward__missing_eos": "exclude", "rollout__max_new_tokens": 1, "diagnose__enabled": False, "guard__every": 0}
    run(tiny_job(tmp_path, tuning__critic="least_squares", ppo__iterations=2, ppo__critic_warmup=0, **options))
    rounds = [m for m in metrics(tmp_path / "run") if m.get("stage") == "ppo" and "iteration" in m]
    left_out = [m for m in rounds if m["completions/excluded"] == 12]
    assert left_out and all("loss/value_avg" not in m for m in left_out)
    assert all(math.isfinite(v) for m in rounds for v in m.values() if isinstance(v, float))


def test_parts_are_all_rows_in_their_order() -> None:
    lengths = [3, 0, 5, 1, 4]
    states = [torch.full((n, 2), float(i), dtype=torch.bfloat16) for i, n in enumerate(lengths)]
    features = Features(states, [torch.full((n,), 10.0 + i) for i, n in enumerate(lengths)])
    parts = list(features.parts([4, 1, 0, 2], tokens=4))
    assert [rows for rows, _ in parts] == [[4], [1, 0, 2]]
    assert torch.cat([x for _, x in parts]).tolist() == [[float(i), float(i), 10.0 + i] for i in (4, 0, 2) for _ in range(lengths[i])]
    assert list(features.parts([])) == []


def test_what_is_decided_so_far_is_the_rewards_own_terms() -> None:
    """By hand: clip, shift and EOS option as in the reward; a token's own term is not yet in it, and no infinity reaches it."""
    rollout = Rollout(
        [[5]] * 2,
        [0, 1],
        torch.ones(2, 3, dtype=torch.int64),
        torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
        torch.zeros(2, 3),
        torch.ones(2).bool(),
    )
    ratio = torch.tensor([[0.5, 9.0, 1.0], [-math.inf, 2.0, 0.0]])
    config = build({"reward": {"token_clip": 2.0, "token_shift": 0.25, "include_eos": False}})
    found = decided_so_far(ratio, torch.zeros(2, 3), rollout, config)
    assert found.tolist() == [[0.0, 0.25, 2.0], [0.0, -2.25, -2.25]]
    plain = decided_so_far(torch.tensor([[0.5, 9.0, 1.0], [1.0, 2.0, 0.0]]), torch.zeros(2, 3), rollout, build({}))
    assert plain[:, :2].tolist() == [[0.0, 0.5], [0.0, 1.0]] and float(plain[0, 2]) == 9.5


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_job_resumes_exactly_and_saves_only_the_head(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {
        "tuning__critic": "least_squares",
        "diagnose__enabled": False,
        "guard__every": 0,
        "ppo__iterations": 4,
        "ppo__critic_warmup": 1,
    }
    config = tiny_job(tmp_path, kind=kind, **options)
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
    rounds = [m for m in metrics(tmp_path / "run") if m.get("stage") == "ppo" and "iteration" in m]
    assert ends[0]["weight"].abs().max() > 0 and "policy/entropy_avg" not in rounds[-1]
    assert [m["policy/steps"] > 0 for m in rounds] == [False, True, True, True]  # the warm-up round only fits
    assert all(m["loss/value_avg"] > 0 and "critic/lr" not in m and "critic/grad_norm" not in m for m in rounds)
    assert rounds[0]["critic/mean_value"] != rounds[1]["critic/mean_value"]


def test_the_two_kinds_of_critic_are_not_mixed_up(tmp_path: Path) -> None:
    place = save_tiny(tmp_path / "llama")
    own, fitted = critic_of(place, "full", True), critic_of(place, "full", False)
    with pytest.raises(ModelError, match="without a trunk"):
        own.values_of(Features([], []), [])
    with pytest.raises(ModelError, match="critic"):
        fitted.load_critic_state(own.critic_state())
    with pytest.raises(ModelError, match="exists already"):
        fitted.create_critic("sft", trunk=False)
    fitted.drop("critic")
    assert not fitted.has_critic

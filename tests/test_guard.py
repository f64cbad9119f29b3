"""The guard over PPO: that it changes nothing it watches, what it keeps, and that a stop anywhere changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import srppo
from srppo.config import RunConfig, dump
from srppo.models.roles import Roles
from srppo.progress import make_progress
from srppo.records import Prompt
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.run_folder import RunFolder
from srppo.train import guard as guard_module
from srppo.train.checkpoint_state import read_state, state_text
from srppo.train.compute import Compute
from srppo.train.guard import Guard
from srppo.train.interrupt import Interrupted
from srppo.train.ppo import PPOSetup, PPOState, train_ppo
from tiny_guard import job, looks, new_guard, some_roles
from tiny_job import StopAt

# --- a run of PPO alone


class Killed(Exception):
    """A process that ends without saving."""


def ppo(config: RunConfig, *, stop_at: float = math.inf, resume: bool = False) -> tuple[Roles, PPOState]:
    """train_ppo in the run folder, with a guard as the configuration says."""
    roles = some_roles(config)
    with RunFolder.open(config.output, dump(config), resume=resume) as run:
        setup = PPOSetup(
            roles,
            [Prompt([10 + i, 20, 30], "", i) for i in range(5)],
            config,
            engine=TorchEngine(roles.special, 8),
            sampling=Sampling(config.rollout.max_new_tokens),
            run=run,
            progress=make_progress("quiet"),
            compute=Compute(),
            interrupt=StopAt(stop_at),
            decode=str,
        )
        state = train_ppo(setup, evaluate=lambda _: {}, guard=new_guard(roles, config, run) if config.guard.every else None)
    return roles, state


def records(config: RunConfig) -> list[dict[str, Any]]:
    """The run's metrics without the clock."""
    lines = map(json.loads, (Path(config.output) / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if not k.startswith(("timing/", "memory/")) and "tokens_per_second" not in k} for r in lines]


def peak_at(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Make a round the best of all."""
    monkeypatch.setattr(guard_module, "criterion", lambda look: -abs(look.round - best))


def kept(config: RunConfig) -> list[str]:
    return sorted(p.name for p in (Path(config.output) / "checkpoints/guard-best").glob("*"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_watching_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Metrics and weights of every round, with the guard and without."""
    every = {
        "ppo__checkpoint_every": 1,
        "ppo__keep_checkpoints": 9,
        "ppo__iterations": 3,
        "guard__stop": False,
        "tuning__lora_dropout": 0.1,
    }
    on, off = job(tmp_path, kind, "on", guard__keep="last", **every), job(tmp_path, kind, "off", **(every | {"guard__every": 0}))
    torch.manual_seed(0)  # dropout draws from the global stream, which a look must leave alone
    ppo(on)
    torch.manual_seed(0)
    _, state = ppo(off)
    assert state.guard is None and not kept(on)
    seen = records(on)
    assert [r.get("step", r.get("iteration")) for r in seen] == [0, 1, 2, 3] and all("guard/criterion" in r for r in seen)
    assert [{k: v for k, v in r.items() if not k.startswith("guard/")} for r in seen[1:]] == records(off)
    for step in (1, 2, 3):
        for part in ("policy", "critic", "policy-optimizer"):
            one, other = (load_file(Path(c.output) / f"checkpoints/ppo/checkpoint-{step}/{part}.safetensors") for c in (on, off))
            assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_stop_anywhere_changes_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in a look, after a look that kept new weights and before its round is saved; stopped in rollouts and scoring."""
    peak_at(monkeypatch, 3)
    whole, broken = (job(tmp_path, kind, name, ppo__iterations=5, guard__patience=9) for name in ("whole", "broken"))
    roles, state = ppo(whole)
    inner: Callable[..., Any] = Guard.look
    see: Callable[..., Any] = Guard._see

    def killed(after: int | None = None, inside: int | None = None) -> None:
        """The process ends after the look of a round, or inside it."""

        def look(self: Guard, round: int) -> Any:
            out = inner(self, round)
            if round == after:
                raise Killed
            return out

        def seeing(self: Guard, round: int) -> Any:
            out = see(self, round)
            if round == inside:
                raise Killed
            return out

        monkeypatch.setattr(Guard, "look", look)
        monkeypatch.setattr(Guard, "_see", seeing)

    stops: list[tuple[dict[str, int], float, list[int]]] = [  # how, safe point of a stop, rounds whose weights lie on disk then
        ({"inside": 1}, math.inf, [0]),  # before any checkpoint, but after the first record
        ({"after": 0}, math.inf, [0]),
        ({}, 3, [0]),  # in the first rollout
        ({"after": 3}, math.inf, [0, 2, 3]),  # PPO's own checkpoints are of rounds 0 and 2: their best looks may be needed again
        ({"inside": 3}, math.inf, [0, 2]),  # resumed from round 2, it has forgotten what came after
        ({"after": 4}, math.inf, [0, 2, 3]),
        ({}, 16, [2, 3]),
    ]
    for i, (how, at, left) in enumerate(stops if kind == "full" else [({"after": 3}, math.inf, [2, 3])]):
        killed(**how)
        with pytest.raises(Interrupted if at < math.inf else Killed):
            ppo(broken, stop_at=at, resume=i > 0)
        assert kept(broken) == [f"checkpoint-{n}" for n in left], how
    killed()
    again, ended = ppo(broken, resume=True)
    assert records(whole) == records(broken)
    assert state.guard and ended.guard and state.guard.outcome(5) == ended.guard.outcome(5)
    assert ended.guard.kept_round(5) == 3 and again.fingerprint("policy") == roles.fingerprint("policy")
    third = load_file(Path(broken.output) / "checkpoints/guard-best/checkpoint-3/policy.safetensors")
    assert all(torch.equal(third[n], t) for n, t in again.state("policy").items())
    assert [asdict(x) for x in state.guard.looks] == [asdict(x) for x in ended.guard.looks]
    final, _ = ppo(broken, resume=True)  # ended, but its stage not yet recorded
    assert records(whole) == records(broken) and final.fingerprint("policy") == roles.fingerprint("policy")


def test_patience_ends_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    peak_at(monkeypatch, 1)
    config = job(tmp_path, ppo__iterations=9, ppo__critic_warmup=2, ppo__checkpoint_every=0)
    _, state = ppo(config)
    assert state.guard and state.guard.outcome(state.iteration) == {"stopped_early": True, "kept_round": 1, "rounds": 4}
    assert [p.name for p in (tmp_path / "run/checkpoints/ppo").iterdir()] == ["checkpoint-4"] and kept(config) == ["checkpoint-1"]
    assert "did not improve" not in capsys.readouterr().err
    roles, resumed = ppo(config, resume=True)
    assert resumed.iteration == 4 and resumed.guard and resumed.guard.kept_round(4) == 1
    assert roles.fingerprint("policy") == roles.fingerprint("sft")  # round 1 was warm-up


def test_a_look_every_other_round_and_after_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak_at(monkeypatch, 9)
    config = job(tmp_path, guard__every=2, ppo__iterations=3)
    _, state = ppo(config)
    assert state.guard and [x.round for x in state.guard.looks] == [0, 2, 3] and kept(config) == ["checkpoint-2", "checkpoint-3"]
    assert ["guard/criterion" in r for r in records(config)] == [True, False, True, True]


def test_the_last_policy_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    peak_at(monkeypatch, 0)
    config = job(tmp_path, guard__keep="last")
    roles, state = ppo(config)
    assert state.guard and state.guard.outcome(2) == {"stopped_early": True, "kept_round": 2, "rounds": 2} and state.iteration == 2
    assert roles.fingerprint("policy") != roles.fingerprint("sft") and not kept(config) and "did not improve" not in capsys.readouterr().err


def test_a_run_begun_without_a_guard_goes_on_without(tmp_path: Path) -> None:
    config = job(tmp_path)
    with pytest.raises(Interrupted):
        ppo(config, stop_at=12)
    for path in (tmp_path / "run/checkpoints/ppo").iterdir():
        content = read_state(path)
        del content["state"]["guard"]
        (path / "state.json").write_bytes(state_text(content))
    _, ended = ppo(config, resume=True)
    assert ended.guard is None and ended.iteration == 4 and "guard/criterion" not in records(config)[-1]


def test_the_alarm_is_sounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = looks(5, 6, 7, reward=[1, 2, 3], auc=[0.8, 0.45, 0.4])
    monkeypatch.setattr(Guard, "_see", lambda self, round: script[round])
    config = job(tmp_path, guard__keep="last")
    with RunFolder.open(config.output, dump(config)) as run:
        guard = new_guard(some_roles(config), config, run)
        assert [guard.look(i)["guard/alarm"] for i in range(3)] == [0.0, 1.0, 1.0] and guard.gives_up
    said = capsys.readouterr().err
    assert said.count("over-optimisation") == 1 and "0.500 to 0.400" in said and "0.45" in said and "reward.kl_coef" in said


# --- the whole job


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_sft_is_kept_where_nothing_is_better(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate that ruins the policy, and nothing that holds it."""
    ruin = {"ppo__learning_rate": 0.1, "reward__kl_coef": 0.0, "ppo__iterations": 9, "sft__steps": 10, "guard__every": 1}
    small = {"evaluation__continued_sft": False, "evaluation__max_prompts": 1, "guard__samples": 1}
    config = job(tmp_path, kind, **(ruin | small))
    srppo.align(config, progress=make_progress("quiet"))
    stage = json.loads((tmp_path / "run/stages/ppo.json").read_text())
    assert (stage["stopped_early"], stage["kept_round"], stage["rounds"], stage["iterations"]) == (True, 0, 2, 2)
    said = capsys.readouterr().err
    assert "did not improve on the SFT" in said and "SFT's weights are kept" in said
    name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    sft, policy = (load_file(tmp_path / "run" / part / name) for part in ("sft", "policy"))
    assert all(torch.equal(sft[n], policy[n]) for n in sft)
    assert not (tmp_path / "run/checkpoints/guard-best").exists()
    before, _, after = records(config)[-3:]
    assert after["guard/heldout_nll"] > before["guard/heldout_nll"] + 0.1


def test_without_heldout_demonstrations_there_is_no_guard(tmp_path: Path) -> None:
    from srppo.stages import make_guard
    from srppo.workspace import open_workspace

    with open_workspace(job(tmp_path, data__heldout=0), make_progress("quiet")) as space:
        assert make_guard(space) is None

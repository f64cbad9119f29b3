"""The guard over PPO: what it sees, that it changes nothing it watches, what it keeps, and that a stop anywhere changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import srppo
from srppo.config import RunConfig, dump
from srppo.data.as_rollout import as_rollout
from srppo.models.roles import Roles, build_roles
from srppo.progress import make_progress
from srppo.records import Example, Prompt, Rollout, pad_sequences
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.run_folder import RunFolder
from srppo.seeding import stream_seed
from srppo.train import guard as guard_module
from srppo.train.compute import Compute
from srppo.train.guard import Guard, Look, alarming, best_of, looks_since_best, watched
from srppo.train.interrupt import Interrupted
from srppo.train.ppo import PPOSetup, PPOState, train_ppo
from tiny_job import StopAt, tiny_job
from tiny_models import EOS, IM_END, train_role

LOOK = Look(
    round=0,
    reward=1.0,
    auc=0.8,
    heldout_nll=1.0,
    heldout_nll_response=5.0,
    match=0.0,
    kl=0.0,
    length=5.0,
    entropy=1.0,
    eos_rate=1.0,
    heldout_probability=0.5,
)


def demonstration(row: int, response: list[int]) -> Example:
    prompt = [10 + row, 20, 30 + row]
    return Example(prompt + response, [0] * 3 + [1] * len(response), row)


HELDOUT = [demonstration(0, [40, 41, EOS]), demonstration(1, [42, EOS]), demonstration(2, [43, 44, 45, EOS])]


# --- demonstrations as rollouts


def test_demonstrations_become_rollouts() -> None:
    examples = [
        Example([10, 11, 20, EOS], [0, 0, 1, 1], 0),
        Example([10, 20, 21], [1, 1, 1], 1),  # text without a prompt
        Example([10, 20, 21, 11, 12, 22, 23, IM_END, 9], [0, 1, 1, 0, 0, 1, 1, 1, 0], 2),  # two turns, and what closes the second
        Example([10, 11, 20], [0, 0, 1], 3),  # cut: no EOS
        Example([10, 11], [0, 0], 4),  # nothing to learn
    ]
    rollout = as_rollout(examples, (EOS, IM_END))
    assert rollout.prompt_index == [0, 2, 3]
    assert rollout.prompt_ids == [[10, 11], [10, 20, 21, 11, 12], [10, 11]]
    assert [rollout.response_ids(b) for b in range(3)] == [[20, EOS], [22, 23, IM_END], [20]]
    assert rollout.ended.tolist() == [True, True, False] and rollout.responses.tolist() == [[20, EOS, 0], [22, 23, IM_END], [20, 0, 0]]
    assert not rollout.behaviour_logprobs.any() and rollout.behaviour_logprobs.shape == rollout.mask.shape
    empty = as_rollout(examples[1:2], (EOS,))
    assert empty.prompt_ids == [] and empty.mask.shape == (0, 0) and empty.mask.dtype == torch.bool


# --- looks in general


def looks(*wrong: float, **series: list[Any]) -> list[Look]:
    """One a round, whose demonstrations' tokens have the probability 1 - wrong / 10; series: other fields by round."""
    return [replace(LOOK, round=i, heldout_probability=1 - x / 10, **{k: v[i] for k, v in series.items()}) for i, x in enumerate(wrong)]


def test_the_best_look_and_the_looks_since() -> None:
    assert best_of(looks(5, 4, 3, 4)).round == 2
    assert best_of(looks(5, 5, 5)).round == 0  # as good is not better
    assert best_of(looks(5, math.nan, 4)).round == 2 and best_of(looks(math.nan, math.nan, 4)).round == 2
    assert looks_since_best(looks(5, 4, 6, 6), 0) == 2
    assert looks_since_best(looks(5, 5, 6, 6), 1) == 2  # round 1 was warm-up
    assert looks_since_best([], 0) == 0


def test_the_alarm() -> None:
    assert not alarming(looks(5.0))
    assert alarming(looks(5, 6, reward=[1, 2], auc=[0.8, 0.45]))
    assert alarming(looks(5, 6, reward=[1, 2], auc=[0.8, 0.69])) and not alarming(looks(5, 6, reward=[1, 2], auc=[0.8, 0.75]))
    assert not alarming(looks(5, 6, reward=[2, 1], auc=[0.8, 0.4]))  # the reward fell too
    assert not alarming(looks(5, 4, reward=[1, 2], auc=[0.8, 0.4]))  # the demonstrations became likelier too
    assert not alarming(looks(5, 6, reward=[1, 2], auc=[0.8, None])) and alarming(looks(5, 6, reward=[1, 2], auc=[None, 0.4]))
    assert not alarming(looks(5, 6, 5, reward=[1, 2, 3], auc=[0.8, 0.4, 0.4]))  # over at the last look


# --- a run of PPO alone


class Killed(Exception):
    """A process that ends without saving."""


def job(folder: Path, kind: str = "full", name: str = "run", **changes: Any) -> RunConfig:
    small = {"prompts_per_iteration": 3, "samples_per_prompt": 1, "epochs": 1, "minibatches": 1, "iterations": 4, "checkpoint_every": 2}
    values = {f"ppo__{k}": v for k, v in small.items()} | {"guard__every": 1, "guard__samples": 2, "rollout__max_new_tokens": 4}
    values |= {"guard__stop": True, "guard__patience": 2, "guard__keep": "best", "ppo__critic_warmup": 0, "diagnose__enabled": False}
    return tiny_job(folder, "llama", kind, output=str(folder / name), **(values | changes))


def some_roles(config: RunConfig) -> Roles:
    """base and sft, as PPO finds them."""
    roles = build_roles(config)
    roles.create("sft", "base")
    train_role(roles, "sft", steps=2)
    return roles


def new_guard(roles: Roles, config: RunConfig, run: RunFolder, demonstrations: Rollout | None = None) -> Guard:
    shown = watched(HELDOUT, roles, config) if demonstrations is None else demonstrations
    return Guard(roles, shown, config, engine=TorchEngine(roles.special, 8), run=run, progress=make_progress("quiet"))


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
    return [{k: v for k, v in r.items() if not k.startswith("timing/") and "tokens_per_second" not in k} for r in lines]


def peak_at(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Make a round the best of all."""
    monkeypatch.setattr(guard_module, "criterion", lambda look: -abs(look.round - best))


def kept(config: RunConfig) -> list[str]:
    return sorted(p.name for p in (Path(config.output) / "checkpoints/guard-best").glob("*"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_a_look_sees(kind: str, tmp_path: Path) -> None:
    """Against sums and loops over the models' own logits."""
    config = job(tmp_path, kind, reward__missing_eos_penalty=2.0)
    roles = some_roles(config)
    roles.create("policy", "sft")
    train_role(roles, "policy")
    with RunFolder.open(config.output, dump(config)) as run:
        shown = watched(HELDOUT, roles, config)
        with roles.use("policy") as model:  # the second prompt's first sample becomes its demonstration
            seeds = [stream_seed(config.seed, "guard", i, s) for i in range(3) for s in range(2)]
            prompts = [shown.prompt_ids[i] for i in range(3) for _ in range(2)]
            drawn = TorchEngine(roles.special, 8).generate(model, prompts, seeds, Sampling(4))
        samples = [drawn.response_ids(b) for b in range(6)]
        wanted = [shown.response_ids(0), samples[2], shown.response_ids(2)]
        mask = pad_sequences([[1] * len(w) for w in wanted]).bool()
        ended = torch.tensor([w[-1] == EOS for w in wanted])
        given = Rollout(shown.prompt_ids, [0, 1, 2], pad_sequences(wanted), mask, torch.zeros(mask.shape), ended)
        guard = new_guard(roles, config, run, given)
        metrics = guard.look(0)
        again = guard.look(1)

    def token_logprobs(role: str, prompt: list[int], response: list[int]) -> torch.Tensor:
        with roles.use(role) as model:
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].detach()

    def logprob(role: str, prompt: list[int], response: list[int]) -> float:
        return float(token_logprobs(role, prompt, response).sum())

    def reward(prompt: list[int], response: list[int]) -> float:
        fine = 0.0 if response[-1] == EOS else 2.0
        return logprob("sft", prompt, response) - logprob("base", prompt, response) - fine

    shares, matches = [], 0
    for i, (prompt, demonstrated) in enumerate(zip(shown.prompt_ids, wanted)):
        points = []
        for sample in samples[2 * i : 2 * i + 2]:
            if sample == demonstrated:
                matches += 1
                continue
            ours, theirs = reward(prompt, sample), reward(prompt, demonstrated)
            points.append(1.0 if theirs > ours else 0.5 if theirs == ours else 0.0)
        if points:
            shares.append(sum(points) / len(points))
    rows = list(zip(prompts, samples))
    policy = [logprob("policy", p, r) for p, r in rows]
    nll = [-logprob("policy", p, w) for p, w in zip(shown.prompt_ids, wanted)]
    likely = [float(token_logprobs("policy", p, w).exp().mean()) for p, w in zip(shown.prompt_ids, wanted)]
    tokens = sum(map(len, samples))
    assert matches >= 1
    expected = {
        "reward": sum(reward(p, r) for p, r in rows) / 6,
        "auc": sum(shares) / len(shares),
        "heldout_nll": sum(nll) / sum(map(len, wanted)),
        "heldout_nll_response": sum(nll) / 3,
        "match": matches / 6,
        "kl": sum(lp - logprob("sft", p, r) for lp, (p, r) in zip(policy, rows)) / 6,
        "length": tokens / 6,
        "entropy": -sum(policy) / tokens,
        "eos_rate": sum(r[-1] == EOS for r in samples) / 6,
        "length_ratio": 1.0,
        "heldout_probability": sum(likely) / 3,
        "criterion": sum(likely) / 3,
        "alarm": 0.0,
    }
    assert metrics.keys() == {f"guard/{name}" for name in expected} | {"timing/guard"}
    assert {name: metrics[f"guard/{name}"] for name in expected} == pytest.approx(expected, abs=2e-5)
    assert abs(expected["kl"]) > 1e-3 and {**again, "timing/guard": 0} == {**metrics, "timing/guard": 0}  # the same random numbers


def test_nothing_that_differs_gives_no_auc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job(tmp_path)
    roles = some_roles(config)
    roles.create("policy", "sft")
    monkeypatch.setattr(guard_module.Responses, "same_as", lambda ours, _: ours.lengths > 0)
    with RunFolder.open(config.output, dump(config)) as run:
        metrics = new_guard(roles, config, run).look(0)
    assert "guard/auc" not in metrics and metrics["guard/match"] == 1.0


def test_which_demonstrations_are_watched(tmp_path: Path) -> None:
    config = job(tmp_path, guard__heldout=2)
    roles = some_roles(config)
    long = Example([9] * 509 + [40], [0] * 509 + [1], 0)  # 512 positions, four of them for a response
    bare = Example([40, EOS], [1, 1], 1)
    assert watched([long, bare], roles, config).prompt_ids == []
    assert watched([long, HELDOUT[2], bare], roles, config).prompt_ids == [[12, 20, 32]]
    first = watched(HELDOUT * 5, roles, config)
    assert len(first.prompt_ids) == 2 and first.prompt_ids == watched(HELDOUT * 5, roles, config).prompt_ids


def test_the_reward_model_judges_the_demonstrations_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Judge:
        def __init__(self) -> None:
            self.asked: list[Rollout] = []

        def scores(self, rollout: Rollout, rows: int) -> torch.Tensor:
            self.asked.append(rollout)
            return rollout.lengths.float()

    config, judge = job(tmp_path), Judge()
    roles = some_roles(config)
    roles.create("policy", "sft")
    with RunFolder.open(config.output, dump(config)) as run:
        guard = new_guard(roles, config, run)
        monkeypatch.setattr(guard, "_preference_model", judge)
        first, second = guard.look(0), guard.look(1)
    assert sorted(len(rollout.prompt_ids) for rollout in judge.asked) == [3, 6, 6] and first["guard/auc"] == second["guard/auc"]


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
    for state in (tmp_path / "run/checkpoints/ppo").glob("*/state.json"):
        content = json.loads(state.read_text())
        del content["guard"]
        state.write_text(json.dumps(content))
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

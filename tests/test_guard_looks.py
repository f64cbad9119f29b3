"""What the guard's looks see, on models by loops over their logits, and what is made of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from srppo.config import dump
from srppo.data.as_rollout import as_rollout
from srppo.records import Example, Rollout, pad_sequences
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.run_folder import RunFolder
from srppo.seeding import stream_seed
from srppo.train import guard as guard_module
from srppo.train.guard import alarming, best_of, looks_since_best, watched
from tiny_guard import HELDOUT, job, looks, new_guard, some_roles
from tiny_models import EOS, IM_END, train_role

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
    assert not alarming(looks(5, 3, 4, reward=[1, 2, 3], auc=[0.8, 0.8, 0.4]))  # past its best, and still better than the SFT
    assert alarming(looks(5, 7, 6, reward=[1, 3, 2], auc=[0.8, 0.4, 0.4]))  # on the way back, and still worse


# --- looks of a model


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

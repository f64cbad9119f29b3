"""Evaluation numbers on answers made up for the purpose, and retention measures that must be zero for the base itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srppo.evaluate import Answers, Evaluation, evaluate, limit_per_group, lost_and_gained
from srppo.models.roles import build_roles
from srppo.records import Prompt
from srppo.retention import base_answers, forgetting
from srppo.rollout.torch_engine import TorchEngine
from tiny_job import tiny_job


def prompt(i: int, group: str, answer: str) -> Prompt:
    return Prompt([7 + i, 8 + i], f"p{i}", i, group, {"answer": answer})


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return build_roles(tiny_job(tmp_path_factory.mktemp("evaluate")))


def test_scores_lengths_and_ends_are_those_of_the_answers(roles) -> None:  # type: ignore[no-untyped-def]
    prompts = [prompt(i, "even" if i % 2 == 0 else "odd", "x") for i in range(6)]

    def scorer(text: str, fields: dict) -> float:
        return float(len(text) % 2)

    result = evaluate(
        roles,
        "base",
        prompts,
        scorer=scorer,
        engine=TorchEngine(roles.special, 8),
        decode=lambda ids: "".join(map(chr, ids)),
        max_new_tokens=6,
        samples=3,
        seed=0,
    )
    assert list(result.groups) == ["even", "odd"]
    for name, group in result.groups.items():
        own = [row for row in result.rows if row.group == name]
        assert group.n == 3 and group.samples == 3
        assert group.sampled == pytest.approx(sum(len(t) % 2 for row in own for t in row.sampled) / 9)
        assert group.greedy == pytest.approx(sum(len(row.greedy) % 2 for row in own) / 3)
        assert group.mean_length == pytest.approx(sum(n for row in own for n in row.lengths) / 9)
        assert group.sampled_low <= group.sampled <= group.sampled_high
    again = evaluate(
        roles,
        "base",
        prompts,
        scorer=None,
        engine=TorchEngine(roles.special, 3),
        decode=lambda ids: "".join(map(chr, ids)),
        max_new_tokens=6,
        samples=3,
        seed=0,
    )
    assert [r.sampled for r in again.rows] == [r.sampled for r in result.rows]  # common random numbers, whatever the batches
    assert again.groups["even"].sampled is None and again.rows[0].greedy_score is None


def answers(scores: list[float]) -> Evaluation:
    return Evaluation({"g": None}, [Answers("g", i, "", [], None, "", s, []) for i, s in enumerate(scores)])  # type: ignore[dict-item]


def test_lost_and_gained_by_hand() -> None:
    out = lost_and_gained(answers([1, 1, 1, 1, 0]), answers([1, 0, 1, 1, 1]))
    assert out == {"g": {"lost": 0.25, "gained": 1.0, "base_right": 4.0}}
    assert lost_and_gained(answers([1, 0]), answers([1, 0]))["g"] == {"lost": 0.0, "gained": 0.0, "base_right": 1.0}


def test_limit_per_group_keeps_the_first_of_each() -> None:
    prompts = [prompt(i, "ab"[i % 2], "") for i in range(10)]
    assert [p.row for p in limit_per_group(prompts, 2)] == [0, 1, 2, 3]
    assert len(limit_per_group(prompts, None)) == 10


def test_forgetting_is_the_kl_from_the_base(roles, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    prompts = [prompt(i, "g", "") for i in range(40)]
    said = base_answers(roles, prompts, TorchEngine(roles.special, 64), 4, seed=0)
    assert forgetting(roles, "base", said, 16)["nats_per_token"] == 0.0
    roles.create("other", "base")
    with torch.no_grad():
        for p in roles.parameters("other").values():
            p.mul_(0.5)
    measured = forgetting(roles, "other", said, 16)
    with roles.use("base") as base, roles.use("other") as other:  # the exact KL of the first token, from full distributions
        ids = torch.tensor([p.ids for p in prompts])
        first, second = (torch.log_softmax(m(input_ids=ids).logits[:, -1], -1) for m in (base, other))
        exact = float((first.exp() * (first - second)).sum(-1).mean())
    assert measured["nats_per_token"] == pytest.approx(exact, rel=0.5) and measured["nats_per_token"] > 0
    roles.drop("other")

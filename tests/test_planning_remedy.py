"""What is proposed where a recipe does not fit: the mildest that does, found with few dry runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from srppo.config import RunConfig
from srppo.planning import plan as planning
from srppo.planning.architecture import read_architecture
from srppo.planning.inputs import Lengths, changed
from srppo.planning.machine import Machine
from srppo.planning.plan import Plan, make_plan
from srppo.planning.remedy import Remedy, find_remedy, lowers, milder, remedies
from tiny_job import tiny_job
from tiny_models import save_tiny

LENGTHS = Lengths(40, 24, 30.0, 20.0, 64, 50.0)
GPU = Machine("X", True, int(1e12), None, 1e14, 1e12, 1e-5, 0, False)
LEAST: dict[str, Any] = {  # all that changes nothing but speed is used already
    "ppo__micro_batch_tokens": 256,
    "sft__micro_batch_tokens": 256,
    "rollout__batch_size": 8,
    "evaluation__batch_size": 8,
    "model__gradient_checkpointing": True,
}


def plan_of(config: RunConfig, machine: Machine = GPU, lengths: Lengths = LENGTHS) -> Plan:
    return make_plan(config, read_architecture(config.model), lengths, machine)


def remedy_with(config: RunConfig, memory: int, lengths: Lengths = LENGTHS) -> Remedy | None:
    """With a GPU that holds a plan of so many bytes just so."""
    return find_remedy(config, read_architecture(config.model), lengths, replace(GPU, memory=round(memory / 0.9) + 1))


def test_every_change_that_is_proposed_is_needed(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, ppo__minibatches=1, ppo__prompts_per_iteration=32, sft__batch_size=64)
    whole = plan_of(config).need
    for share in (0.85, 0.45):
        found = remedy_with(config, round(share * whole))
        assert found is not None and found.plan.fits and found.plan.need <= share * whole + 1
        assert plan_of(changed(config, found.changes), found.plan.machine).need == found.plan.need
        for key in found.changes:
            rest = {k: v for k, v in found.changes.items() if k != key}
            assert not plan_of(changed(config, rest), found.plan.machine).fits, (share, key)


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [
        ("rollout.merge_adapters", False, {"tuning__kind": "lora"}),
        ("rollout.engine", "torch", {"rollout__engine": "vllm", "rollout__memory": 0.9}),
        ("tuning.critic", "least_squares", {"model__frozen_dtype": "bfloat16", "model__offload_frozen": True}),
    ],
)
def test_the_change_that_saves_what_is_too_much(key: str, value: Any, more: dict[str, Any], tmp_path: Path) -> None:
    """A GPU on which the recipe with that one change fits just so, and everything milder is used up. Weights are more than activations."""
    save_tiny(tmp_path / "wide", "llama", hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    config, short = tiny_job(tmp_path, "wide", **LEAST, **more), Lengths(4, 4, 4.0, 4.0, 8, 8.0)
    with_it = plan_of(changed(config, {key: value}), lengths=short).need
    found = remedy_with(config, with_it, short)
    assert found is not None and found.changes == {key: value}
    assert found.plan.need == with_it


def test_a_fitted_critic_is_not_proposed_where_its_sums_outweigh_an_adapter(tmp_path: Path) -> None:
    config = tiny_job(tmp_path, kind="lora", tuning__lora_rank=1, ppo__prompts_per_iteration=400, **LEAST)
    assert {"tuning.critic": "least_squares"} in list(remedies(config, True, 2))
    assert plan_of(changed(config, {"tuning.critic": "least_squares"})).need > plan_of(config).need
    found = remedy_with(config, round(0.97 * plan_of(config).need))
    assert found is None or "tuning.critic" not in found.changes


def test_while_weights_do_not_fit_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_job(tmp_path)
    run: set[object] = set()
    real = planning._cached

    def counting(*work: Any) -> Any:
        run.add(work[1:])
        return real(*work)

    monkeypatch.setattr(planning, "_cached", counting)
    assert remedy_with(config, 1000) is None and not run
    found = remedy_with(config, round(0.45 * plan_of(config).need))
    assert found is not None and 0 < len(run) <= 20


def test_sizes_are_doubled_as_often_as_fits() -> None:
    tried = []

    def attempt(changes: dict[str, Any]) -> Any:
        tried.append(changes["size"])
        return SimpleNamespace(fits=changes["size"] <= 2100)

    assert milder({"size": 256, "other": 1}, "size", 8192, attempt) == {"size": 2048, "other": 1}
    assert len(tried) <= 3 and 8192 not in tried
    assert milder({"size": 256}, "size", 300, attempt) == {"size": 256}


def test_what_counts_as_lower() -> None:
    assert lowers({"a": 9, "b": 5}, {"a": 9, "b": 6})  # another change may lower a
    assert not lowers({"a": 10, "b": 5}, {"a": 9, "b": 6})
    assert not lowers({"a": 9}, {"a": 9})
    assert lowers({"b": 9}, {"a": 9})
    assert lowers({}, {"a": 1})

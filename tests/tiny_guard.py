"""A guard small enough for tests: three demonstrations, made-up looks, and a job of PPO alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from srppo.config import RunConfig
from srppo.models.roles import Roles, build_roles
from srppo.progress import make_progress
from srppo.records import Example, Rollout
from srppo.rollout.torch_engine import TorchEngine
from srppo.run_folder import RunFolder
from srppo.train.guard import Guard, Look, watched
from tiny_job import tiny_job
from tiny_models import EOS, train_role

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


def looks(*wrong: float, **series: list[Any]) -> list[Look]:
    """One a round, whose demonstrations' tokens have the probability 1 - wrong / 10; series: other fields by round."""
    return [replace(LOOK, round=i, heldout_probability=1 - x / 10, **{k: v[i] for k, v in series.items()}) for i, x in enumerate(wrong)]


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

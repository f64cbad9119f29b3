"""Options through the whole job: that what the recipe says reaches the code that does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from srppo.config import RunConfig, build
from srppo.job import align
from srppo.methods.srppo import coherent_reward
from srppo.progress import make_progress
from srppo.records import Example
from srppo.rollout.engine import Sampling
from srppo.rollout.torch_engine import TorchEngine
from srppo.train.compute import Compute
from srppo.train.continued import budget_steps
from srppo.train.experience import score
from tiny_job import tiny_job, write_rows
from tiny_models import save_tiny, standard_roles

FAST: dict[str, Any] = {"diagnose__enabled": False, "guard__every": 0, "ppo__iterations": 2, "evaluation__continued_sft": False}


def run(config: RunConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = align(config, progress=make_progress("quiet"))
    return summary, [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_packed_sft_learns_what_padded_sft_learns(kind: str, tmp_path: Path) -> None:
    """A step of one batch that holds all demonstrations, laid out both ways: the same losses, step by step."""
    losses = []
    for batching in ("length_grouped", "packed"):
        config = tiny_job(tmp_path, kind=kind, output=str(tmp_path / batching), sft__batching=batching, sft__batch_size=16, **FAST)
        losses.append([r["loss"] for r in run(config)[1] if r["stage"] == "sft" and "loss" in r])
    assert len(losses[0]) == 3 and losses[0][0] > losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_evaluations_during_ppo_are_logged(tmp_path: Path) -> None:
    _, records = run(tiny_job(tmp_path, evaluation__every=1, **FAST))
    first = next(r for r in records if r["stage"] == "ppo" and r["iteration"] == 1)
    assert {"eval/all/sampled", "eval/all/greedy", "eval/all/mean_length", "eval/heldout_nll"} <= set(first)
    assert first["eval/heldout_nll"] > 0


def test_the_summary_tells_what_the_run_cost(tmp_path: Path) -> None:
    summary, _ = run(tiny_job(tmp_path, **FAST))
    assert summary["seed"] == 0 and summary["wall_seconds"] > 0 and summary["peak_rss_mb"] > 50
    assert summary["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("placement", "token"),
        ("length_normalization", "mean"),
        ("scale", 3.0),
        ("token_shift", 0.5),
        ("token_clip", 2.0),
        ("include_eos", False),
        ("missing_eos", "exclude"),
        ("missing_eos_penalty", 7.0),
        ("whiten", True),
    ],
)
def test_every_reward_key_reaches_the_reward(key: str, value: Any) -> None:
    assert getattr(coherent_reward(build({}).reward), key) != value
    assert getattr(coherent_reward(build({"reward": {key: value}}).reward), key) == value


@pytest.mark.parametrize(("anchor", "role"), [("sft", "sft"), ("base", "base"), ("none", None)])
def test_the_anchor_is_the_one_asked_for(anchor: str, role: str | None, tmp_path: Path) -> None:
    roles = standard_roles(save_tiny(tmp_path / "llama"), "full")
    with roles.use("sft") as model:
        rollout = TorchEngine(roles.special, 8).generate(model, [[5, 6]] * 4, range(4), Sampling(6))
    found = score(roles, rollout, build({"reward": {"kl_anchor": anchor}}), Compute())
    if role is None:
        assert found.lp_anchor is None
    else:
        said = {"sft": found.lp_sft, "base": found.lp_base}
        assert found.lp_anchor is not None and torch.equal(found.lp_anchor, said[role])
        assert not torch.equal(found.lp_sft, found.lp_base)


def test_continued_sft_has_ppos_budget() -> None:
    """10 demonstrations of 20 tokens, 4 a step: a step trains 80 tokens, which cost 240 passes."""
    examples = [Example(list(range(20)), [0] * 10 + [1] * 10, i) for i in range(10)]
    assert budget_steps(examples, 4, 2400) == 10
    assert budget_steps(examples, 100, 2400) == 4  # all 10 in a step
    assert budget_steps(examples, 4, 1) == 1


def test_conversations_go_through_the_whole_job(tmp_path: Path) -> None:
    """TRL's `messages` as demonstrations and message lists as prompts, through the tokenizer's chat template to the answers."""

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    talks = [
        [turn("system", "s"), turn("user", f"{i}?"), turn("assistant", f"a{i}"), turn("user", "and"), turn("assistant", f"b{i}")]
        for i in range(16)
    ]
    config = tiny_job(tmp_path, **FAST)
    write_rows(Path(str(config.data.demonstrations)), [{"messages": talk} for talk in talks])
    write_rows(Path(str(config.data.prompts)), [{"prompt": [turn("system", "s"), turn("user", f"{i}!")]} for i in range(16)])
    summary, records = run(config)
    assert summary["sft"]["all"]["n"] > 0 and sum("iteration" in r for r in records) == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "policy")
    shown = {json.loads(line)["prompt"] for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()}
    asked = [[turn("system", "s"), turn("user", f"{i}!")] for i in range(16)]
    rendered = {tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False) for talk in asked}
    assert shown and shown <= rendered
    report = json.loads((tmp_path / "run/data.json").read_text())
    assert report["demonstrations"]["formats"] == report["prompts"]["formats"] == {"conversation": 16}
    assert report["demonstrations"]["learned_tokens"] == sum(len(f"b{i}") + 1 for i in range(16))  # the last answers and their ends

"""Edges of what is computed and said: tiny coefficients, many rows, one prompt, odd values in a card."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srppo import intervals
from srppo.config import build
from srppo.diagnose.reward_card import BetaRow, Decision, Estimate, LengthBias, Preference, RewardCard, RewardSpread
from srppo.diagnose.verdict import judge_reward
from srppo.errors import ConfigError
from srppo.job import run_diagnose
from srppo.progress import make_progress
from srppo.report.card_words import checkpoint, plain_number, real
from srppo.report.reward_card import basis_of, choice_of
from srppo.text import counted
from tiny_job import tiny_job

# --- coefficients


@pytest.mark.parametrize("value", [5e-324, 1e-300, 1e-39, 9e-7, -1])
def test_a_coefficient_that_cannot_be_computed_with_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"reward\.kl_coef: input should be auto, 0 or above; what is not 0 at least 1e-06"):
        build({"reward": {"kl_coef": value}})
    with pytest.raises(ConfigError, match=r"diagnose\.betas: input should be one or more numbers above 0, at least 1e-06"):
        build({"diagnose": {"betas": [value, 1.0]}})


def test_the_smallest_coefficient_can_be_computed_with(tmp_path: Path) -> None:
    small = {"diagnose__samples": 2, "diagnose__prompts": 2, "diagnose__betas": [1e-6, 1.0]}
    card = run_diagnose(tiny_job(tmp_path, reward__kl_coef=1e-6, **small), progress=make_progress("quiet"))
    assert any(p["name"] == "logits, beta 1e-06" for p in card["preview"]) and card["decision"]["beta"] == 1e-6
    assert build({"reward": {"kl_coef": 0}}).reward.kl_coef == 0


# --- the bootstrap


@pytest.mark.parametrize("n", [1, 2, 7, 100, 4097])
def test_the_draws_are_those_of_one_go(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(n).random(n)
    picks = np.random.default_rng(3).integers(n, size=(intervals.DRAWS, n))
    wanted = tuple(np.quantile(x[picks].mean(1), [0.025, 0.975]).tolist())
    assert intervals.bootstrap_interval(x.tolist(), 3) == wanted
    for chunk in (1, 3 * n, 5000 * n + 1):
        monkeypatch.setattr(intervals, "CHUNK", chunk)
        assert intervals.bootstrap_interval(x.tolist(), 3) == wanted


def test_many_values_need_little_memory() -> None:
    values = np.random.default_rng(0).random(10_000).tolist()
    tracemalloc.start()
    intervals.bootstrap_interval(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 90e6  # at once: 640 MB


# --- sentences


def few(n: int, group: str = "all", **changes: Any) -> RewardCard:
    """A card on n held-out prompts."""
    share, gain, score = Estimate(0.9, 0.8, 1.0, n), Estimate(0.2, 0.1, 0.3, n), Estimate(0.1, 0.05, 0.2, n)
    rows = [BetaRow(1.0, "held-out", 0.8, 0.2, 1.5, 10.0), BetaRow(1.0, group, 0.8, 0.2, 1.5, 20.0, accuracy_gain=score)]
    spreads = [RewardSpread("sft", name, 1.0, 0.5, [0.1, 0.5, 1.0, 1.5, 2.0], 10.0, 0.5, 100) for name in ("held-out", group)]
    bias = LengthBias(0.9, 0.01, 0.9, 0.3, 0.9, 0.2)
    decision, told = Decision("sft", "sft", 1.0, gain, []), [Preference("sft", "all", share, share)]
    return replace(RewardCard("go", [], decision, told, bias, rows, spreads, [], [], [], n, 1, 8), **changes)


def test_one_prompt_is_one_and_has_no_interval() -> None:
    said = " ".join(judge_reward(few(1))[1])
    assert "Only 1 held-out demonstration:" in said and "in 90 % of the cases (1 prompt; chance is 50 %)" in said
    assert " to +" not in said and "80 to 100 %" not in said
    said = " ".join(judge_reward(few(3))[1])
    assert "(80 to 100 %, 3 prompts; chance is 50 %)" in said and "(+0.10 to +0.30)" in said
    card = few(1).to_dict()
    assert basis_of(card) == "It rests on 1 held-out demonstration (never trained on) and 1 PPO prompt, 8 samples each."
    assert "interval" not in choice_of(card) and "(95 % interval 0.10 to 0.30)" in choice_of(few(3).to_dict())


def test_groups_are_called_in_sentences_as_in_tables() -> None:
    said = " ".join(judge_reward(few(20))[1])
    assert "longer on all prompts" in said and "samples on all prompts end" in said
    assert "on all " not in said.replace("on all prompts", "")
    assert "on the prompts 'without demonstrations'" in " ".join(judge_reward(few(20, "without_demonstrations"))[1])


def test_odd_values_of_a_card() -> None:
    assert real(10**400) is None and plain_number(-(10**400)) == "–" and real(3) == 3.0 and real(True) is None
    assert checkpoint("share-²") == "share-²" and checkpoint("share-0.5", brief=True) == "SFT at 50 %"
    assert (counted(0, "prompt"), counted(1, "prompt"), counted(2, "prompt")) == ("0 prompts", "1 prompt", "2 prompts")

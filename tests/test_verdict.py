"""The card's verdict: each reason from a card that has only that against it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from srppo.diagnose.reward_card import BetaRow, Decision, Estimate, LengthBias, Preference, RewardCard, RewardSpread
from srppo.diagnose.scored import pool
from srppo.diagnose.verdict import judge_reward
from srppo.intervals import bootstrap_interval

GOOD = Estimate(0.9, 0.8, 1.0, 20)
GAIN = Estimate(0.2, 0.1, 0.3, 20)
BIAS = LengthBias(0.1, 0.01, 0.1, 0.3, 0.9, 0.2)


def spread(group: str, mean: float = 1.0, tail: float = 2.0, length: float = 10.0, ends: float = 1.0) -> RewardSpread:
    return RewardSpread("sft", group, mean, 0.5, [0.1, 0.5, 1.0, 1.5, tail], length, ends, 100)


MATCHING = BetaRow(1.0, "held-out", 0.8, 0.2, 1.5, 10.0, match=0.42)


def card(**changes: Any) -> RewardCard:
    """A card with nothing against it."""
    decision = Decision("sft", "sft", 1.0, GAIN, ["reward.kl_coef"])
    rows = [BetaRow(1.0, g, 0.8, 0.2, 1.5, 10.0) for g in ("held-out", "other")]
    spreads = [spread("held-out"), spread("other")]
    whole = RewardCard("go", [], decision, [Preference("sft", "all", GOOD, GOOD)], BIAS, rows, spreads, [], [], [], 20, 48, 8)
    return replace(whole, **changes)


def deciding(gain: Estimate, automatic: bool = True) -> Decision:
    return Decision("sft", "sft", 1.0, gain, ["reward.kl_coef"] if automatic else [])


def preferring(*figures: float) -> list[Preference]:
    return [Preference("sft", "all", Estimate(*figures, 20), GOOD)]


LOSS = Estimate(-0.1, -0.3, 0.1, 20)
LOSING: dict[str, Any] = {"decision": deciding(LOSS), "spreads": [spread("held-out"), spread("other", tail=2.2)]}


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "go", "prefers a held-out demonstration to the SFT model's own samples in 90 %"),
        ({"preferences": preferring(0.3, 0.2, 0.45)}, "no-go", "only in 30 %"),
        ({"preferences": preferring(0.6, 0.4, 0.7)}, "caution", "perhaps no better than chance"),
        (
            {"preferences": [Preference("sft", "all", Estimate(None), GOOD)], "decision": deciding(Estimate(-1e-9, -1e-9, 1e-9, 20))},
            "caution",
            "nothing is left to gain",
        ),
        ({"spreads": [spread("held-out", mean=-5.0, tail=-1.0), spread("other", mean=-4.0, tail=0.5)]}, "go", "prefers"),
        ({"preferences": []}, "caution", "no held-out demonstrations"),
        (LOSING, "no-go", "At beta 1, the card's choice, PPO would not make .* earn about as much or more on PPO's prompts"),
        (LOSING | {"decision": deciding(LOSS, automatic=False)}, "no-go", "At beta 1 PPO would not"),
        (LOSING | {"spreads": [spread("held-out"), spread("other", tail=1.5)]}, "caution", "but the best-paid samples earn less"),
        (LOSING | {"spreads": [spread("held-out"), spread("other", tail=1.5), spread("third", tail=2.5)]}, "no-go", "earn about as much"),
        (LOSING | {"spreads": [spread("held-out")]}, "no-go", r"\(-0.30 to \+0.10\)\.$"),
        (LOSING | {"decision": deciding(Estimate(float("nan"), float("nan"), float("nan"), 20))}, "caution", "cannot be computed"),
        (
            {"decision": deciding(LOSS), "spreads": [spread("held-out", tail=-1.0), spread("other", tail=0.5)]},
            "no-go",
            "At beta 1, the card",
        ),
        (
            LOSING | {"betas": [replace(MATCHING, match_gain=0.07)]},
            "caution",
            r"-0.10 nats a response \(-0.30 to \+0.10\); but it would say what they say more often \(35 to 42 % of",
        ),
        (
            LOSING | {"betas": [replace(MATCHING, match_gain=0.009)]},
            "no-go",
            "At beta 1, the card",
        ),
        (LOSING | {"betas": [replace(MATCHING, beta=0.5, match_gain=0.1)]}, "no-go", "At beta 1, the card"),
        ({"decision": deciding(Estimate(0.1, -0.1, 0.3, 20))}, "caution", "is not clear: \\+0.10"),
        ({"decision": deciding(Estimate(None))}, "go", "prefers"),
        ({"length_bias": replace(BIAS, eos_share=0.7)}, "caution", "70 % of the reward sits in the EOS token"),
        (
            {"spreads": [spread("held-out"), spread("other", ends=0.5)]},
            "caution",
            "Only 50 % of the SFT model.s samples on the prompts .other.",
        ),
        ({"spreads": [spread("held-out"), spread("other", mean=0.05)]}, "caution", "hardly changed how it answers there"),
        ({"spreads": [spread("held-out"), spread("other", tail=2.6)]}, "caution", "surest where nothing was shown"),
        ({"preferences": [Preference("sft", "all", Estimate(0.3, 0.2, 0.45, 4), GOOD)]}, "caution", "perhaps no better than chance"),
        ({"preferences": [Preference("sft", "all", Estimate(1.0, 1.0, 1.0, 4), GOOD)]}, "caution", "4 prompts; .* too few to tell"),
        ({"heldout": 5}, "caution", "Only 5 held-out demonstrations"),
    ],
)
def test_each_reason(changes: dict[str, Any], verdict: str, words: str) -> None:
    found, reasons = judge_reward(card(**changes))
    assert found == verdict and any(re.search(words, r) for r in reasons), reasons


@pytest.mark.parametrize(
    ("length", "rank", "verdict"), [(14.0, 0.6, "caution"), (7.0, -0.6, "caution"), (14.0, 0.3, "go"), (11.0, 0.9, "go")]
)
def test_length_bias_needs_both_a_reward_and_a_change(length: float, rank: float, verdict: str) -> None:
    rows = [BetaRow(1.0, "held-out", 0.8, 0.2, 1.5, 10.0), BetaRow(1.0, "other", 0.8, 0.2, 1.5, length)]
    found, reasons = judge_reward(card(betas=rows, length_bias=replace(BIAS, spearman_within=rank)))
    said = {word for word in ("longer", "shorter") if word in " ".join(reasons)}
    assert found == verdict and said == (set() if verdict == "go" else {"longer" if length > 10 else "shorter"}), reasons


def test_the_gravest_reason_is_first() -> None:
    found, reasons = judge_reward(card(decision=deciding(Estimate(0.1, -0.1, 0.3, 20)), preferences=preferring(0.3, 0.2, 0.45)))
    assert found == "no-go" and "only in 30 %" in reasons[0] and "is not clear" in reasons[1]


def test_a_handful_of_demonstrations_stops_nothing() -> None:
    found, reasons = judge_reward(card(heldout=5, preferences=preferring(0.3, 0.2, 0.45)))
    assert found == "caution" and "only in 30 %" in reasons[0] and "Only 5" in reasons[1]


def scored(*gains: tuple[float, float, float]) -> list[BetaRow]:
    """Rows at the decision's beta, a group of PPO's prompts a score gain; another beta's say the contrary."""
    rows = [BetaRow(1.0, f"group {i}", 0.8, 0.2, 1.5, 10.0, accuracy_gain=Estimate(*gain, 20)) for i, gain in enumerate(gains)]
    return [*rows, *(replace(row, beta=0.2, accuracy_gain=Estimate(-0.5, -0.6, -0.4, 20)) for row in rows)]


CLEAR, PERHAPS, WORSE, HARM = (0.1, 0.05, 0.15), (0.02, -0.01, 0.05), (-0.06, -0.13, 0.01), (-0.1, -0.15, -0.05)
AGAINST: dict[str, Any] = LOSING | {"preferences": preferring(0.3, 0.2, 0.45)}
SPEAK, LEAN = r"only in 30 % .* The scores speak for it all the same\.", r"only in 30 % .* The scores lean the other way\."


@pytest.mark.parametrize(
    ("changes", "gains", "verdict", "words"),
    [
        ({}, [CLEAR], "go", r"would answer better, \+10.0 points \(\+5.0 to \+15.0\)\.$"),
        ({}, [PERHAPS], "go", "perhaps better"),
        ({}, [CLEAR, WORSE], "go", r"perhaps better, \+2.0 .*: \+10.0 on the prompts 'group 0', -6.0 on the prompts 'group 1'"),
        ({}, [CLEAR, HARM], "caution", "answer no better"),
        ({}, [(0.3, 0.25, 0.35), HARM], "caution", "answer better"),  # one group falls clearly
        ({}, [HARM, HARM, PERHAPS], "no-go", "answer worse"),
        (AGAINST, [CLEAR, PERHAPS], "go", SPEAK),
        (AGAINST, [PERHAPS], "caution", LEAN),
        (AGAINST, [WORSE], "no-go", "only in 30 %"),
        (AGAINST | {"heldout": 5}, [HARM], "no-go", "answer worse"),  # scores need no demonstrations
    ],
)
def test_scores_decide_where_there_are_any(
    changes: dict[str, Any], gains: list[tuple[float, float, float]], verdict: str, words: str
) -> None:
    found, reasons = judge_reward(card(betas=scored(*gains), **changes))
    assert found == verdict and any(re.search(words, r) for r in reasons), reasons


def test_the_pooled_interval_is_that_of_all_prompts() -> None:
    """Scores of two groups, their bootstrap intervals, against the interval of the mean over all prompts."""
    rng = np.random.default_rng(3)
    groups = {"a": rng.normal(0.2, 1.0, 60), "b": rng.normal(-0.1, 2.0, 200)}
    told = {name: Estimate(float(x.mean()), *bootstrap_interval(x.tolist()), len(x)) for name, x in groups.items()}
    whole = np.concatenate(list(groups.values()))
    error = np.sqrt(sum(len(x) * x.var(ddof=1) for x in groups.values())) / len(whole)
    found = pool(told)
    assert found.value == pytest.approx(whole.mean()) and found.n == 260 and found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_scores_of_some_groups_or_a_handful_of_prompts_excuse_nothing() -> None:
    rows = scored(CLEAR)
    unscored = BetaRow(1.0, "other", 0.8, 0.2, 1.5, 10.0)
    assert judge_reward(card(betas=[*rows, unscored], **AGAINST))[0] == "no-go"
    few = [replace(row, accuracy_gain=replace(row.accuracy_gain, n=4)) for row in scored(CLEAR) if row.accuracy_gain]
    found, reasons = judge_reward(card(betas=few, **AGAINST))
    assert found == "no-go" and any("fits only 4 prompts" in r for r in reasons)
    few = [replace(row, accuracy_gain=replace(row.accuracy_gain, n=4)) for row in scored(HARM) if row.accuracy_gain]
    assert judge_reward(card(betas=few))[0] == "go"


def test_scores_do_not_excuse_what_they_cannot_see() -> None:
    found, reasons = judge_reward(card(betas=scored(CLEAR), length_bias=replace(BIAS, eos_share=0.7)))
    assert found == "caution" and "EOS" in reasons[0]

"""The grid's page judges a row as the card itself was judged, and counts what PPO did."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
from benchmarks import card_grid_page as page

from srppo.diagnose.reward_card import BetaRow, Decision, Estimate, LengthBias, Preference, RewardCard, RewardSpread
from srppo.diagnose.verdict import judge_reward

GROUPS = ("with_demonstrations", "without_demonstrations")


def live(gain: float, match_gain: float, tail: float, auc: tuple[float, float, float], scores: float) -> RewardCard:
    """A card as `srppo diagnose` makes it, at beta 1, with another beta beside."""
    decision = Decision("sft", "sft", 1.0, Estimate(gain, gain - 0.05, gain + 0.05, 16), ["reward.kl_coef"])
    score = Estimate(scores, scores - 0.02, scores + 0.02, 20)
    held = BetaRow(1.0, "held-out", 0.8, 0.2, 1.5, 4.0, match=0.5, gain=decision.gain, match_gain=match_gain)
    rows = [held, *(BetaRow(1.0, g, 0.8, 0.2, 1.5, 4.0, accuracy=Estimate(0.5), accuracy_gain=score) for g in GROUPS)]
    rows += [replace(row, beta=0.5, gain=Estimate(9.0, 8.0, 10.0, 16) if row is held else None) for row in rows]
    spreads = [RewardSpread("sft", g, 1.0, 0.5, [0.1, 0.5, 1.0, 1.5, 2.0], 4.0, 1.0, 100) for g in ("held-out", *GROUPS)]
    spreads[-1] = replace(spreads[-1], quantiles=[0.1, 0.5, 1.0, 1.5, 2.0 * tail])
    preferences = [Preference("sft", "all", Estimate(*auc, 16), Estimate(1.0))]
    return RewardCard("go", [], decision, preferences, LengthBias(0.1, 0.0, 0.1, 0.2, 0.9, 0.2), rows, spreads, [], [], [], 16, 48, 8)


def row(card: RewardCard, **more: Any) -> dict[str, Any]:
    """What the result file keeps of it."""
    told = asdict(card)
    kept = {"rows": told["betas"], "spreads": told["spreads"], "length_bias": told["length_bias"], "auc": told["preferences"][0]["auc"]}
    return {"seed": 1, "demonstrations": 64, "strength": "light", "beta": 1.0, **kept, **more}


@pytest.mark.parametrize("gain", [-0.2, 0.2])
@pytest.mark.parametrize("match_gain", [-0.1, 0.1])
@pytest.mark.parametrize("tail", [0.6, 1.1, 1.6])
@pytest.mark.parametrize("auc", [(0.9, 0.8, 1.0), (0.2, 0.1, 0.4)])
@pytest.mark.parametrize("scores", [-0.1, 0.0, 0.1])
def test_a_row_is_judged_as_its_card(gain: float, match_gain: float, tail: float, auc: tuple[float, float, float], scores: float) -> None:
    card = live(gain, match_gain, tail, auc, scores)
    unscored = replace(card, betas=[replace(r, accuracy=None, accuracy_gain=None) for r in card.betas])
    assert judge_reward(page.card(row(card), scored=True))[0] == judge_reward(card)[0]
    assert judge_reward(page.card(row(card), scored=False))[0] == judge_reward(unscored)[0]


def test_outcomes_are_counted_by_verdict() -> None:
    good, bad = live(0.2, 0.1, 0.6, (0.9, 0.8, 1.0), 0.1), live(-0.2, -0.1, 1.6, (0.2, 0.1, 0.4), -0.1)
    changed = [(good, 0.1), (good, 0.01), (bad, -0.2), (bad, -0.01), (bad, 0.04)]
    rows = [row(c, seed=i, gain={g: {"gain": change} for g in GROUPS}) for i, (c, change) in enumerate(changed)]
    cells = [line.strip("| ").split(" | ")[:4] for line in page.confusion(rows, scored=False)[2:]]
    assert cells == [["go", "1", "1", "0"], ["caution", "0", "0", "0"], ["no-go", "1", "1", "1"], ["all", "2", "2", "1"]]


def test_the_cards_beta_is_held_against_one() -> None:
    card = live(0.2, 0.1, 0.6, (0.9, 0.8, 1.0), 0.1)
    rows = [row(card, beta=b, suggested_beta=2.0, gain={g: {"gain": x} for g in GROUPS}) for b, x in ((1.0, 0.10), (2.0, 0.13), (0.5, 0.3))]
    assert page.own_betas(rows)[2] == "| light | 2 | 1 | +13.0 | +10.0 | +3.0 |"

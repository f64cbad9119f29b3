"""Reward cards by hand: a full one, one that lacks most, a hostile one."""

from __future__ import annotations

import io
import math
import random
from typing import Any

from srppo.diagnose.reward_card import (
    BetaRow,
    Candidate,
    Decision,
    Estimate,
    LengthBias,
    Preference,
    PreviewRow,
    RewardCard,
    RewardSpread,
    TokenMap,
)
from srppo.diagnose.tell import tell
from srppo.progress import make_progress

BETAS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)
NOTHING = Estimate(None)


def around(value: float, half: float, n: int = 48) -> Estimate:
    return Estimate(value, value - half, value + 0.9 * half, n)


def beta_row(beta: float, group: str) -> BetaRow:
    held, reach = group == "held-out", 1 / beta
    return BetaRow(
        beta,
        group,
        effective=math.exp(-0.25 * reach),
        kl=0.12 * reach**1.3,
        reward=2.1 + 0.5 * reach,
        length=18.4 + 0.8 * reach,
        match=0.31 + 0.03 * reach if held else None,
        gain=around(0.5 * reach - 0.12 * reach**2, 0.1 + 0.08 * reach) if held else None,
        accuracy=around(min(0.9, 0.55 + 0.06 * reach), 0.06),
        accuracy_gain=around(0.06 * reach - 0.012 * reach**2, 0.03),
    )


def token_map(author: str, prompt: str, group: str, rng: random.Random) -> TokenMap:
    centre = {"demonstration": 0.4, "sft": 0.25, "base": -0.5}[author]
    tokens = ["Let", " me", " see", ":", " ", "4", "8", " +", " 2", "4", " =", " ", "7", "2", ".", "\n", "So", " 7", "2", "<|im_end|>"]
    ratios = [rng.gauss(centre, 0.6) for _ in tokens]
    return TokenMap(author, group, prompt, tokens, ratios, sum(ratios), float(author != "base"))


def full_card(groups: tuple[str, ...] = ("with_demonstrations", "without_demonstrations")) -> RewardCard:
    rng = random.Random(0)
    everywhere = ("held-out", *groups)
    return RewardCard(
        verdict="caution",
        reasons=["The reward prefers longer answers (rank correlation +0.41).", "Only 41 held-out demonstrations were looked at."],
        decision=Decision("share-0.5", "sft", 1.5, around(0.28, 0.15), ["sft.keep", "reward.kl_coef"]),
        preferences=[
            Preference(against, bucket, around(0.83 - 0.02 * i, 0.06, 41 - 10 * i), around(3.4 - i, 0.8, 41 - 10 * i))
            for against in ("base", "sft")
            for i, bucket in enumerate(("all", "1 to 12 tokens", "13 to 24 tokens", "25 to 90 tokens"))
        ],
        length_bias=LengthBias(0.41, 0.07, 0.12, 0.22, 0.58, 0.34),
        betas=[beta_row(b, g) for g in everywhere for b in BETAS],
        spreads=[
            RewardSpread(a, g, m, 2.0, [m - 3.1, m - 1.2, m + 0.1, m + 1.3, m + 3.4], 18.4, 0.97, 384)
            for i, g in enumerate(everywhere)
            for a, m in (("base", -2.2 + 0.1 * i), ("sft", 2.1 - 0.15 * i))
        ],
        candidates=[
            Candidate(s, n, around(0.8, 0.05), 1.5, around(0.25, 0.1), 21.3, 21.05, (s, n) == ("share-0.5", "sft"))
            for s in ("share-0.25", "share-0.5", "sft")
            for n in ("share-0.5", "sft")
        ],
        preview=[
            PreviewRow(name, g, 2.0 + i, 18.0 + i, 0.97, 0.5 + 0.05 * i, 0.3 if g == "held-out" else None, [" 48 + 24 = 72.", " about 70"])
            for g in everywhere
            for i, name in enumerate(("base", "sft", "logits, beta 1.5", "weights, alpha 0.67"))
        ],
        maps=[
            token_map(a, f"Natalia sold {48 + i} clips in April and half as many in May. How many in all?", g, rng)
            for i, g in enumerate(everywhere)
            for a in ("base", "sft", "demonstration")
            if a != "demonstration" or g == "held-out"
        ],
        heldout=41,
        prompts=48,
        samples=8,
    )


def bare_card(text: str = "nothing to look at", verdict: Any = "no-go") -> RewardCard:
    """All that may be absent is."""
    return RewardCard(
        verdict,
        [text],
        Decision("sft", "sft", 1.0, NOTHING),
        [Preference("base", "all", NOTHING, NOTHING)],
        LengthBias(None, None, None, 0.0, 0.0, 0.0),
        [BetaRow(1.0, "all", 1.0, 0.0, 0.0, 3.0)],
        [],
        [],
        [],
        [],
        0,
        1,
        2,
    )


def hostile_card(attack: str) -> RewardCard:
    return RewardCard(
        "go",
        [attack],
        Decision(attack, attack, 1.0, NOTHING, [attack]),
        [Preference(attack, attack, around(0.5, 0.1), NOTHING)],
        LengthBias(None, None, None, 0.0, 0.0, 0.0),
        [beta_row(1.0, attack)],
        [RewardSpread(attack, attack, 0.0, 1.0, [-2.0, -1.0, 0.0, 1.0, 2.0], 3.0, 1.0, 4)],
        [Candidate(attack, attack, NOTHING, 1.0, NOTHING, 1.0, 1.0, True)] * 2,
        [PreviewRow(attack, attack, 0.0, 1.0, 1.0, None, None, [attack])],
        [TokenMap(attack, attack, attack, [attack, "\x00", "\u05d0"], [0.5, -0.5, 0.1], 0.1, None)],
        1,
        1,
        2,
    )


def told(card: RewardCard, mode: str = "plain") -> str:
    stream = io.StringIO()
    tell(card, make_progress(mode, stream))
    return stream.getvalue()

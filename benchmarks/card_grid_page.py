"""docs/results/card_grid.md and its figure from benchmarks/results/card_grid.jsonl: the card's prediction against what PPO did.

The verdict is given anew from each row's figures by the rules as they are now, so that a change of a threshold shows at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from srppo.diagnose.reward_card import BetaRow, Decision, Estimate, LengthBias, Preference, RewardCard, RewardSpread
from srppo.diagnose.statistics import spearman
from srppo.diagnose.verdict import judge_reward
from srppo.intervals import bootstrap_interval

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/results/card_grid.md"
HARM = 0.03  # a change of accuracy by less is called no change
TUNING = (200, 201)  # seeds on which rules and thresholds were chosen, but for MATCHES_MORE
SEEN = (202, 203)  # seen too when that one was added; all others check everything
VERDICTS = ("go", "caution", "no-go")
OUTCOMES = ("better", "no change", "worse")


def heldout_rows(row: dict[str, Any]) -> dict[float, dict[str, Any]]:
    return {r["beta"]: r for r in row["rows"] if r["group"] == "held-out"}


def card(row: dict[str, Any], beta: float) -> RewardCard:
    """As much of the card as the verdict reads, for PPO at one beta."""
    most = max(heldout_rows(row))  # where rows were noted before the card had match_gain: equal weights, nearly
    betas = []
    for r in row["rows"]:
        kept = {k: v for k, v in r.items() if k not in ("gain", "accuracy", "accuracy_gain")}
        if r["group"] == "held-out":
            kept.setdefault("match_gain", r["match"] - heldout_rows(row)[most]["match"])
        betas.append(BetaRow(**kept))
    auc = Preference("sft", "all", Estimate(**row["auc"]), Estimate(None))
    decision = Decision("sft", "sft", beta, Estimate(**heldout_rows(row)[beta]["gain"]))
    spreads = [RewardSpread(**s) for s in row["spreads"]]
    return RewardCard("go", [], decision, [auc], LengthBias(**row["length_bias"]), betas, spreads, [], [], [], 16, 48, 8)


def outcome(row: dict[str, Any]) -> str:
    """What PPO did to sampled accuracy on families without demonstrations."""
    gain = row["gain"]["without_demonstrations"]["gain"]
    return "better" if gain > HARM else "worse" if gain < -HARM else "no change"


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row
        | {
            "verdict": judge_reward(card(row, row["beta"]))[0],
            "predicted": heldout_rows(row)[row["beta"]]["gain"]["value"],
            "outcome": outcome(row),
        }
        for row in rows
    ]


def confusion(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| verdict | " + " | ".join(OUTCOMES) + " | mean change without demonstrations |", "|---|---|---|---|---|"]
    for verdict in VERDICTS:
        own = [r for r in rows if r["verdict"] == verdict]
        counts = " | ".join(str(sum(r["outcome"] == o for r in own)) for o in OUTCOMES)
        changes = [100 * r["gain"]["without_demonstrations"]["gain"] for r in own]
        mean = "–" if not own else f"{np.mean(changes):+.1f}"
        if len(own) > 1:
            low, high = bootstrap_interval(changes)
            mean += f" ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {verdict} | {counts} | {mean} |")
    return lines


def rank_correlation(rows: list[dict[str, Any]], group: str) -> str:
    """Spearman's, of the predicted likelihood gain with the change of accuracy."""
    found = spearman(np.array([r["predicted"] for r in rows]), np.array([r["gain"][group]["gain"] for r in rows]))
    return "–" if found is None else f"{found:+.2f}"


def table(rows: list[dict[str, Any]]) -> list[str]:
    head = "| demonstrations | SFT | β | AUC | predicted, nats | verdict | SFT with / without | change with | change without |"
    lines = [head, "|" + "---|" * 9]
    cells = sorted({(r["demonstrations"], r["strength"], r["beta"]) for r in rows}, key=lambda c: (c[1] != "light", c[1] == "heavy", c))
    for count, strength, beta in cells:
        own = [r for r in rows if (r["demonstrations"], r["strength"], r["beta"]) == (count, strength, beta)]
        aucs = [r["auc"]["value"] for r in own if r["auc"]["value"] is not None]
        auc = f"{np.mean(aucs):.2f}" if aucs else "–"
        verdicts = ", ".join(f"{sum(r['verdict'] == v for r in own)} {v}" for v in VERDICTS if any(r["verdict"] == v for r in own))
        groups = ("with_demonstrations", "without_demonstrations")
        before = " / ".join(f"{100 * np.mean([r['sft'][g] for r in own]):.0f}" for g in groups)
        changes = " | ".join(f"{100 * np.mean([r['gain'][g]['gain'] for r in own]):+.1f}" for g in groups)
        predicted = f"{np.mean([r['predicted'] for r in own]):+.2f}"
        lines.append(f"| {count} | {strength} | {beta:g} | {auc} | {predicted} | {verdicts} | {before} | {changes} |")
    return lines


def write_page(rows: list[dict[str, Any]]) -> None:
    rows = judged(rows)
    tuning, seen = ([r for r in rows if r["seed"] in some] for some in (TUNING, SEEN))
    checking = [r for r in rows if r["seed"] not in TUNING + SEEN]
    seeds = ", ".join(str(s) for s in sorted({r["seed"] for r in rows}))
    seconds = np.mean([r["seconds"] for r in rows])
    lines = [
        "# Is the reward card right?",
        "",
        "`python benchmarks/card_grid.py` and `… --page`. The embedded world, SFTs of three strengths on 16, 64 and 256 demonstrations,",
        f"16 more held out; seeds {seeds}, {len(rows)} PPO runs of 15 rounds without guard, {seconds:.0f} s each with one thread. The card",
        "sees no answers. The verdict here is on PPO at the β of the row, not at the card's own. Change: sampled accuracy after PPO",
        "minus before, points, 300 prompts × 2 samples.",
        f"Better and worse: beyond ±{100 * HARM:.0f} points on families without demonstrations.",
        "",
    ]
    for title, own in (
        (f"Seeds {', '.join(map(str, TUNING))}, on which the rules were chosen", tuning),
        (f"Seeds {', '.join(map(str, SEEN))}, which check them, but for the rule that a no-go needs fewer matches too (added after)", seen),
        ("The other seeds, which only check them", checking),
    ):
        if own:
            correlation = f"{rank_correlation(own, 'with_demonstrations')} with, {rank_correlation(own, 'without_demonstrations')} without"
            lines += [f"## {title}", "", *confusion(own), ""]
            lines += [f"Rank correlation of the predicted gain with the change: {correlation} demonstrations.", ""]
    lines += ["## All settings, mean over seeds", "", *table(rows), ""]
    PAGE.write_text("\n".join(lines))
    print("\n".join(lines))

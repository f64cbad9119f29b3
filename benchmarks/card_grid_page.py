"""docs/results/card_grid.md from the rows of benchmarks/results/card_grid.jsonl: the card's prediction against what PPO did.

A row's verdict is given from its figures by the rules as they are, for PPO at the row's beta, so that a change of a rule shows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srppo.diagnose.reward_card import BetaRow, Decision, Estimate, LengthBias, Preference, RewardCard, RewardSpread
from srppo.diagnose.statistics import spearman
from srppo.diagnose.verdict import judge_reward, tail_ratio
from srppo.intervals import DRAWS
from srppo.lab.world import WITH, WITHOUT

Row = dict[str, Any]
HARM = 0.03  # a change of accuracy by less is called no change
TUNING = (200, 201, 202, 203)  # seeds on which rules and thresholds were chosen; all others check them
VERDICTS = ("go", "caution", "no-go")
OUTCOMES = ("better", "no change", "worse")
STRENGTHS = ("light", "medium", "heavy")


def at_beta(row: Row, group: str, beta: float | None = None) -> Row:
    """The card's figures for a group of prompts at a beta, the row's own by default."""
    wanted = row["beta"] if beta is None else beta
    return next(r for r in row["rows"] if r["group"] == group and r["beta"] == wanted)


def card(row: Row, scored: bool) -> RewardCard:
    """As much of the card as the verdict reads, for PPO at the row's beta; with the scoring function's figures, or without."""
    betas = []
    for r in row["rows"]:
        told = {name: Estimate(**r[name]) for name in ("gain", "accuracy", "accuracy_gain") if r.get(name)}
        if not scored:
            told = {name: value for name, value in told.items() if name == "gain"}
        betas.append(BetaRow(**{k: v for k, v in r.items() if k not in ("gain", "accuracy", "accuracy_gain")}, **told))
    preferences = [Preference("sft", "all", Estimate(**row["auc"]), Estimate(None))]
    decision = Decision("sft", "sft", row["beta"], Estimate(**at_beta(row, "held-out")["gain"]))
    spreads = [RewardSpread(**s) for s in row["spreads"]]
    return RewardCard("go", [], decision, preferences, LengthBias(**row["length_bias"]), betas, spreads, [], [], [], 16, 48, 8)


def change(row: Row, group: str = WITHOUT) -> float:
    """What PPO did to sampled accuracy."""
    return float(row["gain"][group]["gain"])


def outcome(row: Row) -> str:
    return "better" if change(row) > HARM else "worse" if change(row) < -HARM else "no change"


def tail(row: Row) -> float:
    found = tail_ratio(card(row, scored=False))
    return float("nan") if found is None else found


def card_of(row: Row) -> tuple[Any, ...]:
    return row["seed"], row["demonstrations"], row["strength"]


def mean_change(rows: Sequence[Row], of: Callable[[Row], float] = change) -> str:
    """In points, with a 95 % interval from drawing whole cards: the betas of a card are not independent."""
    if not rows:
        return "–"
    by_card: dict[Any, list[float]] = {}
    for row in rows:
        by_card.setdefault(card_of(row), []).append(100 * of(row))
    sums = np.array([[sum(v), len(v)] for v in by_card.values()])
    mean = sums[:, 0].sum() / sums[:, 1].sum()
    if len(sums) < 2:
        return minus(f"{mean:+.1f}")
    drawn = sums[np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return minus(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")


def minus(text: str) -> str:
    return text.replace("-", "−")


def confusion(rows: Sequence[Row], scored: bool) -> list[str]:
    given = {v: [r for r in rows if judge_reward(card(r, scored))[0] == v] for v in VERDICTS}
    lines = ["| verdict | " + " | ".join(OUTCOMES) + " | mean change without demonstrations |", "|---|---|---|---|---|"]
    for verdict, own in given.items():
        counts = " | ".join(str(sum(outcome(r) == o for r in own)) for o in OUTCOMES)
        lines.append(f"| {verdict} | {counts} | {mean_change(own)} |")
    everything = " | ".join(str(sum(outcome(r) == o for r in rows)) for o in OUTCOMES)
    return [*lines, f"| all | {everything} | {mean_change(rows)} |"]


SIGNS: dict[str, Callable[[Row], float]] = {
    "predicted gain of likelihood": lambda r: at_beta(r, "held-out")["gain"]["value"],
    "AUC": lambda r: 0.5 if r["auc"]["value"] is None else r["auc"]["value"],
    "tail: best-paid rewards on PPO's prompts over those on held-out ones": tail,
    "predicted change of accuracy (needs a scoring function)": lambda r: at_beta(r, WITHOUT)["accuracy_gain"]["value"],
}


def correlations(rows: Sequence[Row]) -> list[str]:
    lines = [f"| sign | all | {' | '.join(STRENGTHS)} |", "|---" * (2 + len(STRENGTHS)) + "|"]
    for name, sign in SIGNS.items():
        cells = []
        for some in (rows, *([r for r in rows if r["strength"] == s] for s in STRENGTHS)):
            found = spearman(np.array([sign(r) for r in some]), np.array([change(r) for r in some]))
            cells.append("–" if found is None else minus(f"{found:+.2f}"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def own_betas(rows: Sequence[Row]) -> list[str]:
    """PPO at the beta that the card suggests, against beta 1 from the same SFT."""
    found = {(card_of(r), r["beta"]): r for r in rows}
    lines = ["| SFT | suggested β | cards | change without, suggested β | β = 1 | difference |", "|---|---|---|---|---|---|"]
    for strength in STRENGTHS:
        chosen = [r for r in rows if r["strength"] == strength and r["beta"] == r["suggested_beta"] and (card_of(r), 1.0) in found]
        if chosen:
            ones = [found[card_of(r), 1.0] for r in chosen]
            betas = ", ".join(f"{b:g}" for b in sorted(r["suggested_beta"] for r in chosen))
            cells = [mean_change(chosen), mean_change(ones), mean_change(chosen, lambda r: change(r) - change(found[card_of(r), 1.0]))]
            lines.append(f"| {strength} | {betas} | {len(chosen)} | {' | '.join(cells)} |")
    return lines


def settings_table(rows: Sequence[Row]) -> list[str]:
    columns = ["SFT", "β", "runs", "AUC", "predicted gain, nats", "predicted change of accuracy, with / without"]
    columns += ["change with", "change without", "length with / without"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for strength, beta in sorted({(r["strength"], r["beta"]) for r in rows}, key=lambda c: (STRENGTHS.index(c[0]), c[1])):
        own = [r for r in rows if (r["strength"], r["beta"]) == (strength, beta)]
        aucs = [r["auc"]["value"] for r in own if r["auc"]["value"] is not None]
        predicted = [f"{100 * np.mean([at_beta(r, g)['accuracy_gain']['value'] for r in own]):+.1f}" for g in (WITH, WITHOUT)]
        changes = [f"{100 * np.mean([change(r, g) for r in own]):+.1f}" for g in (WITH, WITHOUT)]
        lengths = [" → ".join(f"{x:.1f}" for x in np.mean([r["length"][g] for r in own], 0)) for g in (WITH, WITHOUT)]
        gain = np.mean([at_beta(r, "held-out")["gain"]["value"] for r in own])
        cells = [strength, f"{beta:g}", str(len(own)), f"{np.mean(aucs):.2f}" if aucs else "–", f"{gain:+.2f}", " / ".join(predicted)]
        lines.append(minus("| " + " | ".join([*cells, *changes, " / ".join(lengths)]) + " |"))
    return lines


def write_page(rows: list[Row], page: Path) -> None:
    """Write the page of these rows."""
    seeds = sorted({r["seed"] for r in rows})
    parts = [[r for r in rows if (r["seed"] in TUNING) is tuning] for tuning in (True, False)]
    lines = [
        "# Is the reward card right?",
        "",
        "`python benchmarks/card_grid.py`. The embedded world, SFTs of three strengths on 16, 64 and 256 demonstrations, 16 more held out;",
        f"seeds {', '.join(map(str, seeds))}, {len(rows)} PPO runs of 15 rounds without guard,",
        f"{sum(r['seconds'] for r in rows) / 60:.0f} minutes of one core in all. The verdict is on PPO at the β of the run.",
        "Change: sampled accuracy after PPO minus before, points, 300 prompts × 2 samples. Better and",
        f"worse: beyond ±{100 * HARM:.0f} points on families without demonstrations. Intervals: 95 %, drawing cards (the runs",
        "of one card at several β are not independent). The rule that there is no go where fewer than five held-out prompts tell was added",
        "after seeds 204 and 205 had been seen.",
        "",
    ]
    for own, title in zip(parts, ("Seeds on which the rules were chosen", "Seeds that check them")):
        if not own:
            continue
        lines += [f"## {title}: {', '.join(map(str, sorted({r['seed'] for r in own})))}", ""]
        lines += ["The verdict without labels:", "", *confusion(own, scored=False), ""]
        lines += ["The verdict with a scoring function on PPO's prompts:", "", *confusion(own, scored=True), ""]
        lines += ["Rank correlation of what the card says with the change without demonstrations, over all and within a strength:", ""]
        lines += [*correlations(own), ""]
        lines += ["PPO at the card's own β:", "", *own_betas(own), ""]
    lines += ["## All settings, mean over seeds and demonstration counts", "", *settings_table(rows), ""]
    page.write_text("\n".join(lines))

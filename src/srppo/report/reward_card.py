"""The reward card for people: its sentences, and what the page shows of it: safe texts, tables and coloured tokens.

All is made of the plain values of diagnose.json, so that a card which lacks half of them is still shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from srppo.report import card_tables as tables
from srppo.report.card_tables import Table
from srppo.report.card_words import NONE, Row, author, checkpoint, estimate, group, items, line, nats, part, plain_number, real
from srppo.text import clean, counted, percent

PROMPTS_SHOWN = 24  # heat maps of so many prompts
TOKENS_SHOWN = 400  # of one response
GROUPS_SHOWN = 12  # of the preview
PERCENTILE = 0.95  # of |log-ratio|: the strongest colour; rare extremes would leave the rest white
POSITIVE, NEGATIVE = (90, 160, 220), (245, 150, 60)  # the strongest blue and orange that black letters stay readable on
AUTHORS = ("demonstration", "sft", "base")  # in the order of the heat maps
VERDICTS = {
    "go": "The reward tells good from bad: PPO is worth running.",
    "caution": "PPO may help: read the reasons first.",
    "no-go": "PPO on this reward would likely waste its compute or do harm.",
}
NATS = (
    "The reward of a response is log π_sft − log π_base, in nats: 1 says that the SFT model gives it 2.7 times as readily as the base, "
    "2 says 7.4 times, −1 that the base gives it 2.7 times as readily."
)
Shown = Callable[[Any], str]


def headline_of(card: Row) -> str:
    verdict = line(card.get("verdict") or NONE)
    return f"{verdict.upper()}. {VERDICTS[verdict]}" if verdict in VERDICTS else verdict


def reasons_of(card: Row) -> list[str]:
    reasons = card.get("reasons")
    return [line(reason, 600) for reason in reasons] if isinstance(reasons, list) else []


def basis_of(card: Row) -> str:
    def many(key: str, noun: str) -> str:
        n = real(card.get(key))
        return f"{NONE} {noun}s" if n is None else counted(round(n), noun)

    heldout, prompts, samples = many("heldout", "held-out demonstration"), many("prompts", "PPO prompt"), many("samples", "sample")
    return f"It rests on {heldout} (never trained on) and {prompts}, {samples} each."


def choice_of(card: Row) -> str:
    """What PPO will use, and who decided each part."""
    decision = part(card, "decision")
    automatic = decision.get("automatic") or []

    def by(key: str) -> str:
        return "the card's choice" if isinstance(automatic, list) and key in automatic else "set in the recipe"

    gain = estimate(decision.get("gain"), sign=True)
    n = real(part(decision, "gain").get("n"))
    if n is not None and n < 3:  # too few prompts for an interval
        gain = gain._replace(interval="")
    predicted = "" if gain.text == NONE else f" Predicted: held-out demonstrations {gain.text} nats a response likelier"
    return (
        f"PPO will start from {checkpoint(decision.get('start'))} ({by('sft.keep')}), be rewarded by the log-ratio of "
        f"{checkpoint(decision.get('numerator'))} to the base ({by('reward.checkpoint')}), "
        f"and use β {plain_number(decision.get('beta'))} ({by('reward.kl_coef')}); the smaller β, the further it moves."
    ) + (f"{predicted}{f' (95 % interval {gain.interval})' if gain.interval else ''}." if predicted else "")


def length_of(card: Row) -> list[str]:
    """How the reward goes with length, and which tokens carry it; [] where the card does not say."""
    bias = part(card, "length_bias")
    spearman, slope, within = (real(bias.get(k)) for k in ("spearman", "slope", "spearman_within"))
    out = []
    if spearman is not None:
        how = "hardly depends on" if abs(spearman) < 0.2 else f"{'rises' if spearman > 0 else 'falls'} with"
        details = [f"rank correlation {nats(spearman, True)}, where 0 is none and ±1 perfect"]
        details += [f"{nats(within, True)} among answers to the same prompt"] * (within is not None)
        details += [f"{nats(slope, True)} nats for each further token"] * (slope is not None)
        out.append(f"The reward {how} the response's length ({'; '.join(details)}).")
    eos, top, negative = (percent(real(bias.get(k)), 0) for k in ("eos_share", "top_share", "negative_share"))
    if real(bias.get("top_share")):  # else there was no token to look at
        out.append(
            f"Of its size, {eos} sits in the token that ends the response (EOS) and {top} in each response's three largest tokens; "
            f"{negative} of all tokens speak against their response (the base finds them likelier than the SFT model does)."
        )
    return out


def card_view(card: Row, shown: Shown) -> dict[str, Any] | None:
    """Everything of the section, or None without a card. shown: a value as safe text of limited length."""
    if not card:
        return None
    verdict = card.get("verdict")
    return {
        "kind": {"go": "go", "caution": "caution", "no-go": "nogo"}.get(verdict if isinstance(verdict, str) else "", "unknown"),
        "headline": headline_of(card),
        "reasons": reasons_of(card),
        "basis": basis_of(card),
        "choice": choice_of(card),
        "nats": NATS,
        "length": length_of(card),
        "preferences": _view(tables.preferences(card)),
        "heldout": _view(tables.heldout(card)),
        "groups": [_view(table) for table in tables.groups(card)],
        "spreads": _view(tables.spreads(card)),
        "candidates": _view(tables.candidates(card)) if len(items(card, "candidates")) > 1 else None,
        "preview": _preview(card, shown),
        "heat": _heat(card, shown),
    }


def _view(table: Table | None) -> dict[str, Any] | None:
    return None if table is None else asdict(table) | {"rows": [[c._asdict() for c in row] for row in table.rows]}


def _preview(card: Row, shown: Shown) -> dict[str, Any] | None:
    """For each group its figures and, prompt by prompt, what each model says."""
    blocks, found = [], None
    for name in tables.preview_groups(card)[:GROUPS_SHOWN]:
        found = tables.preview(card, [name])
        rows = [r for r in items(card, "preview") if str(r.get("group")) == name and isinstance(r.get("examples"), list)]
        count = max((len(r["examples"]) for r in rows), default=0)
        prompts = [
            [{"model": author(r.get("name")), "text": shown(r["examples"][i])} for r in rows if i < len(r["examples"])]
            for i in range(count)
        ]
        blocks.append({"group": group(name), "table": _view(found), "prompts": prompts})
    return None if found is None else {"title": found.title, "note": found.note, "blocks": blocks}


def _heat(card: Row, shown: Shown) -> dict[str, Any] | None:
    """Heat maps by prompt (rows of one prompt follow each other, an author once), one colour scale for all."""
    blocks: list[list[Row]] = []
    for row in items(card, "maps"):
        if isinstance(row.get("tokens"), list) and isinstance(row.get("log_ratio"), list) and row["tokens"]:
            last = blocks[-1] if blocks else [row]
            same = all(str(last[0].get(k)) == str(row.get(k)) for k in ("group", "prompt"))
            if not blocks or not same or any(r.get("author") == row.get("author") for r in last):
                blocks.append([])
            blocks[-1].append(row)
    kept = blocks[:PROMPTS_SHOWN]
    if not kept:
        return None
    scale = strongest([v for rows in kept for r in rows for v in r["log_ratio"]])
    prompts = [
        {
            "group": group(rows[0].get("group")),
            "prompt": shown(str(rows[0].get("prompt") or "")),
            "maps": [_map(r, scale) for a in (*AUTHORS, None) for r in rows if r.get("author") == a or (a is None and _stranger(r))],
        }
        for rows in kept
    ]
    marks = [scale * share for share in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    legend = [{"text": f"{'≤ ' * (i == 0)}{'≥ ' * (i == 4)}{nats(v, i > 2)}", "colour": colour(v, scale)} for i, v in enumerate(marks)]
    return {"prompts": prompts, "legend": legend, "left_out": len(blocks) - len(kept)}


def _stranger(row: Row) -> bool:
    return row.get("author") not in AUTHORS


def _map(row: Row, scale: float) -> dict[str, Any]:
    pairs = list(zip(row["tokens"], row["log_ratio"], strict=False))
    score = real(row.get("score"))
    return {
        "author": f"{author(row.get('author'))}{' sample' * (row.get('author') in ('sft', 'base'))}",
        "reward": nats(row.get("reward"), sign=True),
        "score": score,
        "tokens": [
            {"text": visible(str(text)), "colour": colour(value, scale), "value": f"{nats(value, True)} nats"}
            for text, value in pairs[:TOKENS_SHOWN]
        ],
        "left_out": max(0, len(pairs) - TOKENS_SHOWN),
    }


def visible(token: str) -> str:
    """A token's text with line ends and tabs marked, and a dot where nothing can be shown."""
    return clean(token).replace("\n", "↵\n").replace("\t", "⇥") or "·"


def strongest(values: list[Any]) -> float:
    """The size of log-ratio that gets the full colour: a high percentile, 0.01 at least."""
    sizes = sorted(abs(v) for value in values if (v := real(value)) is not None)
    return max(sizes[min(len(sizes) - 1, int(PERCENTILE * len(sizes)))], 0.01) if sizes else 1.0


def colour(value: Any, scale: float) -> str:
    """White at 0, blue above, orange below, full at +-scale and beyond; grey where there is no value."""
    found = real(value)
    if found is None:
        return "#dddddd"
    share = min(1.0, abs(found) / scale)
    return "#" + "".join(f"{round(255 + share * (end - 255)):02x}" for end in (POSITIVE if found > 0 else NEGATIVE))

"""report.html: one file, no script, no request to anywhere; every text from a run is escaped and stripped of control characters."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from srppo import __version__
from srppo.report import words
from srppo.report.compare import difference
from srppo.report.plots import Plot, readable
from srppo.report.record import Record
from srppo.report.reward_card import card_view
from srppo.report.speed import speed_view
from srppo.text import clean, duration, number, percent
from srppo.titles import STAGES

TEMPLATES = Path(__file__).parent
PROMPTS_A_GROUP = 3  # shown side by side
GROUPS_SHOWN = 8
ROLLOUTS_SHOWN = 6  # of the first round and of the last
LONGEST = 1500  # characters of one shown text


def render(record: Record, plots: list[Plot]) -> str:
    """The page as HTML."""
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    images = {p.name: {"source": base64.b64encode(p.png).decode(), "caption": p.caption} for p in plots}
    model = (record.config.get("model") or {}).get("name") or "a model"
    return environment.get_template("page.html.jinja").render(
        title=shown(f"{Path(str(model)).name}: {record.path.resolve().name}"),
        facts=_facts(record),
        verdict=[shown(s) for s in words.verdict(record)],
        findings=[shown(s) for s in words.findings(record)],
        warnings=[shown(s) for s in words.warnings(record)],
        missing=[shown(s) for s in record.missing],
        headline=_headline(record),
        card=card_view(record.card, shown),
        retention=_retention(record),
        speed=speed_view(record),
        images=images,
        curves=[name for name in ("accuracy", "reward", "kl", "length", "guard", "loss") if name in images],
        answers=_answers(record),
        rollouts=_rollouts(record),
        data=_flat(record.data),
        environment=_flat(record.environment),
        config=shown(record.config_text, 100_000),
        version=__version__,
        subtitle=_subtitle(record),
    )


def _subtitle(record: Record) -> str:
    if record.learned_reward:
        return "Alignment from demonstrations and a reward model by PPO"
    return "Alignment from demonstrations by Self-Rewarding PPO"


def shown(value: Any, limit: int = LONGEST) -> str:
    """Any value as safe text of limited length (Jinja escapes it)."""
    text = clean(value if isinstance(value, str) else number(value))
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit} characters more)"


def _facts(record: Record) -> list[tuple[str, str]]:
    summary, config = record.summary, record.config
    hardware = record.environment.get("hardware") or {}
    peak = summary.get("peak_rss_mb")
    facts = [
        ("model", (config.get("model") or {}).get("name")),
        ("tuning", (config.get("tuning") or {}).get("kind")),
        ("seed", summary.get("seed", config.get("seed"))),
        ("time", duration(summary["wall_seconds"]) if summary.get("wall_seconds") is not None else None),
        ("peak memory", None if peak is None else f"{peak / 1024:.1f} GiB"),
        ("machine", ", ".join(hardware.get("gpus") or []) or hardware.get("cpu")),
    ]
    return [(name, shown(value)) for name, value in facts if value not in (None, "")]


def _headline(record: Record) -> list[dict[str, Any]]:
    """For each group its stages' rows."""
    return [
        {"group": shown(readable(g)), "rows": [_row(record, g, s) for s in record.stages if g in record.results(s)]} for g in record.groups
    ]


def _row(record: Record, group: str, stage: str) -> dict[str, str]:
    result = record.results(stage)[group]
    low, high, greedy_low, greedy_high = (result.get(k) for k in ("sampled_low", "sampled_high", "greedy_low", "greedy_high"))
    found = difference(record, group, stage, "sft") if stage in ("sft_continued", "srppo") else None
    length = result.get("mean_length")
    return {
        "stage": record.titles[stage],
        "kind": stage,
        "sampled": percent(result.get("sampled")),
        "interval": f"{percent(low)} to {percent(high)}" if low is not None and high is not None else "",
        "against": "" if found is None else words.points(found.gain),
        "verdict": "" if found is None or not found.clear else "up" if found.gain > 0 else "down",
        "greedy": percent(result.get("greedy")),
        "greedy_interval": f"{percent(greedy_low)} to {percent(greedy_high)}" if greedy_low is not None and greedy_high is not None else "",
        "length": "–" if length is None else f"{length:.1f}",
        "eos": percent(result.get("eos_rate")),
        "n": str(result.get("n", "–")) + (f" × {result['samples']}" if (result.get("samples") or 1) > 1 else ""),
    }


def _retention(record: Record) -> dict[str, Any]:
    """Held-out likelihood and forgetting by stage, what was lost and gained by stage and group."""
    nll, forgot, lost = (record.summary.get(k) or {} for k in ("heldout_nll", "forgetting", "lost_and_gained"))
    likelihood = []
    for stage in STAGES:
        loss, nats = nll.get(stage), (forgot.get(stage) or {}).get("nats_per_token")
        if loss is not None or nats is not None:
            likelihood.append([record.titles[stage], "–" if loss is None else f"{loss:.3f}", "–" if nats is None else f"{nats:.3f}"])
    changes = [
        [
            shown(readable(group)),
            record.titles[stage],
            percent(found.get("lost")),
            percent(found.get("gained")),
            number(found.get("base_right", "–")),
        ]
        for group in record.groups
        for stage in STAGES
        if (found := (lost.get(stage) or {}).get(group))
    ]
    return {"likelihood": likelihood, "changes": changes}


def _answers(record: Record) -> list[dict[str, Any]]:
    """The first prompts of each group with every stage's first sample and greedy answer. Not chosen: the first ones."""
    by_prompt: dict[tuple[str, Any, str], dict[str, Any]] = {}
    for stage, rows in record.answers.items():
        for row in rows:
            key = (str(row.get("group")), row.get("row"), str(row.get("prompt")))
            by_prompt.setdefault(key, {})[stage] = row
    taken: dict[str, int] = {}
    out: dict[str, list[dict[str, Any]]] = {}
    for (group, _, prompt), stages in by_prompt.items():
        if taken.get(group, 0) < PROMPTS_A_GROUP and (group in taken or len(taken) < GROUPS_SHOWN):
            taken[group] = taken.get(group, 0) + 1
            lines = [{"stage": record.titles[stage], "answers": _answer_pair(stages[stage])} for stage in STAGES if stage in stages]
            out.setdefault(group, []).append({"group": shown(readable(group)), "prompt": shown(prompt), "lines": lines})
    return [item for items in out.values() for item in items]


def _answer_pair(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The first sample and the greedy answer."""
    sampled, scores = row.get("sampled") or [None], row.get("sampled_scores") or [None]
    pairs = [(sampled[0], scores[0]), (row.get("greedy"), row.get("greedy_score"))]
    return [{"text": "" if text is None else shown(text), "score": None if score is None else float(score)} for text, score in pairs]


def _rollouts(record: Record) -> list[dict[str, Any]]:
    """Samples of the first and of the last PPO round that has any."""
    rounds = sorted({s["iteration"] for s in record.samples if s.get("stage") == "ppo" and isinstance(s.get("iteration"), int)})
    out = []
    for iteration in dict.fromkeys(rounds[:1] + rounds[-1:]):
        rows = [s for s in record.samples if s.get("stage") == "ppo" and s.get("iteration") == iteration][:ROLLOUTS_SHOWN]
        out.append(
            {
                "iteration": iteration,
                "rows": [
                    {
                        "prompt": shown(s.get("prompt", "")),
                        "response": shown(s.get("response", s.get("completion", ""))),
                        "score": shown(s.get("score", s.get("reward", "–"))),
                        "kl": shown(s.get("kl", "–")),
                        "length": shown(s.get("length", "–")),
                        "ended": "–" if s.get("ended") is None else "yes" if s["ended"] else "no",
                    }
                    for s in rows
                ],
            }
        )
    return out


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as rows (dotted key, value); short lists on one line."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        return [row for i, inner in enumerate(value) for row in _flat(inner, f"{prefix}[{i}]")]
    if isinstance(value, list):
        return [(shown(prefix), shown(", ".join(number(v) for v in value)))]
    return [(shown(prefix), "–" if value is None else shown(value))]

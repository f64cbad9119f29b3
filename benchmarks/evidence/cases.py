"""What is compared: trainings by name, and the questions that need them. Data only.

Every name is one row of a result file and a seed. SFT trainings are "sft/NAME", PPO from one of them "ppo/NAME", the same SFT trained
on with PPO's compute "continued/NAME", and what needs no training "free/NAME". "base" is the pretrained model.
Settings marked (chosen) were picked on seed 400, which no table contains: benchmarks/results/evidence_choices.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ROUNDS = 15  # of PPO; accuracy without demonstrations levels off after 15 to 20
SEEDS = (410, 411, 412, 413, 414)
TUNING_SEEDS = (400,)
LIGHT = {"sft.steps": 15, "sft.learning_rate": 1e-4}


@dataclass(frozen=True)
class Sft:
    title: str
    changes: dict[str, Any]
    demonstrations: int = 64


@dataclass(frozen=True)
class Ppo:
    title: str
    sft: str = "light"
    changes: dict[str, Any] = field(default_factory=dict)
    prompts: str = "all"  # of the ten families; "without": of the six that have no demonstrations; "with": of the four that have
    continued: bool = False  # whether SFT with the same compute is run beside it
    numerator: str | None = None  # another SFT, as the reward's numerator
    after: str | None = None  # a PPO run beside which SFT was continued: begins from that continued SFT
    reward_model: str | None = None  # PPO on a reward model, its preferences on prompts of "all" families or of those "with" demonstrations


@dataclass(frozen=True)
class Free:
    title: str
    how: str  # best_of, logits, weights or temperature
    strength: float  # beta of best_of (0: the very best) and logits, alpha of weights, the temperature


SFTS = {
    "light": Sft("SFT (light: 15 steps at 1e-4)", LIGHT),
    "medium": Sft("SFT, medium (60 steps at 1e-4)", {"sft.steps": 60, "sft.learning_rate": 1e-4}),
    "heavy": Sft("SFT, heavy (60 steps at 3e-4)", {"sft.steps": 60, "sft.learning_rate": 3e-4}),
    "low-lr": Sft("SFT at a tenth of the rate, ten times the steps", {"sft.steps": 150, "sft.learning_rate": 1e-5}),
    "16": Sft("SFT, 16 demonstrations", LIGHT, 16),
    "256": Sft("SFT, 256 demonstrations", LIGHT, 256),
    "1024": Sft("SFT, 1024 demonstrations", LIGHT, 1024),
    "lora": Sft("SFT, LoRA (15 steps at 5e-4)", {"tuning.kind": "lora", "sft.steps": 15, "sft.learning_rate": 5e-4}),  # (chosen)
    "saved": Sft(
        "SFT, medium, the checkpoint that the card chose",
        {"sft.steps": 60, "sft.learning_rate": 1e-4, "sft.checkpoints_at": [0.25, 0.5, 1.0]},
    ),
}
CARD = {
    "diagnose.enabled": True,
    "diagnose.on_no_go": "warn",
    "diagnose.preview": False,
    "sft.keep": "auto",
    "reward.checkpoint": "auto",
    "reward.kl_coef": "auto",
    "guard.every": 3,
    "guard.keep": "best",
    "guard.stop": True,
}
PPOS = {
    "eos": Ppo("SRPPO, reward at EOS (the paper's)", continued=True),
    "token": Ppo("SRPPO, reward at each token", changes={"reward.placement": "token"}),
    "length": Ppo("SRPPO, reward / length (× 3)", changes={"reward.length_normalization": "mean", "reward.scale": 3.0}),  # (chosen)
    "shift": Ppo("SRPPO, non-positive (clip ½, shift ½)", changes={"reward.token_clip": 0.5, "reward.token_shift": 0.5}),  # (chosen)
    "reward-model": Ppo("PPO, reward model of right and wrong answers", reward_model="all", changes={"reward.kl_coef": 0.2}),  # (chosen)
    "narrow-model": Ppo("PPO, reward model of the demonstrated families", reward_model="with", changes={"reward.kl_coef": 2.0}),  # (chosen)
    "minimal": Ppo("SRPPO, prompts of the other families alone", prompts="without"),
    "same": Ppo("SRPPO, prompts of the demonstrated families alone", prompts="with"),
    "16": Ppo("SRPPO, 16 demonstrations", "16", continued=True),
    "256": Ppo("SRPPO, 256 demonstrations", "256", continued=True),
    "1024": Ppo("SRPPO, 1024 demonstrations", "1024", continued=True),
    "medium": Ppo("SRPPO, medium SFT", "medium", continued=True),
    "heavy": Ppo("SRPPO, heavy SFT", "heavy", continued=True),
    "beta-0.3": Ppo("SRPPO, β = 0.3", changes={"reward.kl_coef": 0.3}),
    "beta-0.5": Ppo("SRPPO, β = 0.5", changes={"reward.kl_coef": 0.5}),
    "beta-2": Ppo("SRPPO, β = 2", changes={"reward.kl_coef": 2.0}),
    "numerator": Ppo("SRPPO, medium SFT, reward from the light SFT", "medium", numerator="light"),
    "after": Ppo("SRPPO after continued SFT, reward from the light SFT", numerator="light", after="eos"),
    "lora": Ppo("SRPPO, LoRA", "lora", {"tuning.kind": "lora", "ppo.learning_rate": 1e-3, "ppo.critic_learning_rate": 1e-3}),
    "card": Ppo("SRPPO, start, numerator and β by the card, guard on", "saved", CARD),
    "guard": Ppo("SRPPO, guard on", changes={k: v for k, v in CARD.items() if k.startswith("guard.")}),
    "guarded": Ppo("SRPPO, β by the card, guard on", "light", CARD),
}
FREE = {
    "cool": Free("SFT sampled at temperature 0.5", "temperature", 0.5),
    "best-of-16": Free("best of 16 SFT samples by the reward", "best_of", 0.0),
    "drawn-of-16": Free("one of 16 SFT samples, drawn by exp(r / β), β = 1", "best_of", 1.0),
    "logits-2": Free("logit extrapolation, β = 2", "logits", 2.0),
    "logits-1": Free("logit extrapolation, β = 1", "logits", 1.0),
    "logits-0.5": Free("logit extrapolation, β = 0.5", "logits", 0.5),
    "weights-0.25": Free("weight extrapolation, α = 0.25", "weights", 0.25),
    "weights-0.5": Free("weight extrapolation, α = 0.5", "weights", 0.5),
    "weights-1": Free("weight extrapolation, α = 1", "weights", 1.0),
}
# Tried on TUNING_SEEDS to choose what SFTS and PPOS above hold; in no table.
SFTS |= {f"lora-{rate:g}": Sft("", {**SFTS["lora"].changes, "sft.learning_rate": rate}) for rate in (1e-3, 2e-3)}
TRIED = {
    **{f"reward-model-{b:g}": Ppo("", reward_model="all", changes={"reward.kl_coef": b}) for b in (0.05, 0.5)},
    **{f"narrow-model-{b:g}": Ppo("", reward_model="with", changes={"reward.kl_coef": b}) for b in (0.2, 0.5)},
    **{f"shift-{c:g}": Ppo("", changes={"reward.token_clip": c, "reward.token_shift": c}) for c in (1.0, 2.0)},
    "length-1.5": Ppo("", changes={"reward.length_normalization": "mean", "reward.scale": 1.5}),
    "lora-0.0003": Ppo("", "lora", {**PPOS["lora"].changes, "ppo.learning_rate": 3e-4}),
}
PPOS |= TRIED
QUESTIONS: dict[str, list[str]] = {
    "methods": [
        "base",
        "sft/light",
        "sft/low-lr",
        "continued/eos",
        *(f"free/{name}" for name in FREE),
        "ppo/eos",
        "ppo/token",
        "ppo/length",
        "ppo/shift",
        "ppo/reward-model",
        "ppo/narrow-model",
        "ppo/guard",
        "ppo/guarded",
        "ppo/card",
        "sft/saved",  # comes with ppo/card
    ],
    "overlap": ["sft/light", "ppo/eos", "ppo/minimal", "ppo/same"],
    "demonstrations": [
        *("sft/16", "ppo/16", "continued/16", "sft/light", "ppo/eos", "continued/eos"),
        *("sft/256", "ppo/256", "continued/256", "sft/1024", "ppo/1024", "continued/1024"),
    ],
    "strength": [
        *("sft/light", "ppo/eos", "continued/eos", "sft/medium", "ppo/medium", "continued/medium"),
        *("sft/heavy", "ppo/heavy", "continued/heavy"),
    ],
    "beta": ["sft/light", "ppo/beta-0.3", "ppo/beta-0.5", "ppo/eos", "ppo/beta-2"],
    "numerator": ["sft/medium", "ppo/medium", "ppo/numerator", "continued/medium", "continued/eos", "ppo/after"],
    "tuning": ["sft/light", "ppo/eos", "sft/lora", "ppo/lora"],
}

CHOICES = ["sft/lora", *(f"sft/{n}" for n in SFTS if n.startswith("lora-")), *(f"ppo/{n}" for n in TRIED)]
CHOICES += [f"free/{n}" for n in FREE] + [f"ppo/{n}" for n in ("eos", "reward-model", "narrow-model", "shift", "length", "lora")]


def unrunnable(name: str) -> str | None:
    """Why no row of this name can be made; None where it can."""
    kind, _, rest = name.partition("/")
    tables: dict[str, dict[str, Any]] = {"sft": SFTS, "ppo": PPOS, "free": FREE}
    tables["continued"] = {n: case for n, case in PPOS.items() if case.continued}
    if name == "base" or rest in tables.get(kind, {}):
        return None
    known = ", ".join(f"{kind}/{n}" for n in tables[kind]) if kind in tables else "base, sft/…, continued/…, ppo/…, free/…"
    why = f"beside ppo/{rest} no SFT is continued" if kind == "continued" and rest in PPOS else "no such row"
    return f"{name}: {why}; there are {known}"


def title(name: str) -> str:
    """What a row is called in a table."""
    kind, _, rest = name.partition("/")
    if kind == "base":
        return "base"
    if kind == "continued":
        started = SFTS[PPOS[rest].sft].title.removeprefix("SFT").removeprefix(", ").partition(" (")[0]
        return "continued SFT" + (f", {started}" if started else "")
    table: dict[str, Any] = {"sft": SFTS, "ppo": PPOS, "free": FREE}[kind]
    return str(table[rest].title)


def start_of(name: str) -> str:
    """The SFT row a row is compared with."""
    kind, _, rest = name.partition("/")
    if kind in ("ppo", "continued"):
        after = PPOS[rest].after
        return f"continued/{after}" if after else f"sft/{PPOS[rest].sft}"
    return "sft/light"

"""The paper's claims (arXiv 2510.21090), each beside what the embedded world says of it.

Those marked "abstract" stand in its abstract; "experiments" are comparisons of its experiments that we know at second hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from benchmarks.evidence.figures import Estimate, Rows, estimate, gain, gain_difference, seeds_of

from srppo.lab.world import WITH, WITHOUT

VERDICTS = {1: "**holds**", 0: "not clear", -1: "**does not hold**"}
Answer = tuple[str, str]  # figure, verdict
ABSTRACT, EXPERIMENTS = "abstract", "experiments"


@dataclass(frozen=True)
class Claim:
    words: str
    source: str
    setting: str
    needed: tuple[str, ...]  # names of rows
    answer: Callable[[Rows], Answer]


def claims_table(rows: Rows) -> list[str]:
    """A row a claim; claims whose runs are not there yet are left out."""
    lines = [
        "## The paper's claims",
        "",
        "Holds: the 95 % interval of the difference lies on the claim's side; does not hold: on the other; else it is not clear.",
        "Points of sampled accuracy, paired over prompts and seeds. Abstract: so claimed there; experiments: compared in the paper's",
        "experiments, known to us at second hand.",
        "",
        "| claim | source | our setting | our figure | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        if seeds_of(rows, *claim.needed):
            lines.append(f"| {claim.words} | {claim.source} | {claim.setting} | {' | '.join(claim.answer(rows))} |")
    return lines


def told(found: Estimate) -> Answer:
    return found.points(), VERDICTS[found.sign]


def against(words: str, source: str, setting: str, name: str, other: str, group: str = WITHOUT) -> Claim:
    """name does better than other."""
    return Claim(words, source, setting, (name, other), lambda rows: told(gain(rows, name, other, group)))


STARTS = {
    "light": ("ppo/eos", "sft/light"),
    "medium": ("ppo/medium", "sft/medium"),
    "heavy": ("ppo/heavy", "sft/heavy"),
    **{f"{n} demonstrations": (f"ppo/{n}", f"sft/{n}") for n in (16, 256, 1024)},
}
FEW, MANY = STARTS["16 demonstrations"], STARTS["1024 demonstrations"]


def _everywhere(rows: Rows) -> Answer:
    """From every SFT setting, against the SFT it starts from."""
    found = {label: gain(rows, *names, WITHOUT) for label, names in STARTS.items()}
    better = [label for label, g in found.items() if g.sign > 0]
    worse = [label for label, g in found.items() if g.sign < 0]
    figure = "; ".join(f"{label} {g.points()}" for label, g in found.items())
    if len(better) == len(found):
        return figure, VERDICTS[1]
    verdict = f"**holds only** for {', '.join(better)}" if better else VERDICTS[-1] if worse else VERDICTS[0]
    return figure, verdict + (f"; worse for {', '.join(worse)}" if worse else "")


def _scarce(rows: Rows) -> Answer:
    """The gain with few demonstrations minus that with many."""
    figure, verdict = told(gain_difference(rows, FEW, MANY, WITHOUT))
    return f"{gain(rows, *FEW, WITHOUT).points()} and {gain(rows, *MANY, WITHOUT).points()}; apart {figure}", verdict


def _longer(rows: Rows) -> Answer:
    """How much the rollouts grow under token placement, and how much more than under EOS placement, over the seeds."""

    def growth(name: str, seed: int) -> float:
        length = rows[name, seed]["curves"]["length"]
        return length[-1] / length[0] - 1

    seeds = seeds_of(rows, "ppo/token", "ppo/eos")
    each = {name: [growth(name, seed) for seed in seeds] for name in ("ppo/token", "ppo/eos")}
    apart = estimate([np.array([t - e]) for t, e in zip(*each.values())])
    means = " and ".join(f"{100 * float(np.mean(found)):+.0f} %" for found in each.values())
    grown = [estimate([np.array([x]) for x in found]) for found in each.values()]
    verdict = "does not arise: with neither do they grow" if all(g.high < 0.02 for g in grown) else VERDICTS[apart.sign]
    return f"{means}; apart {apart.points()}".replace("-", "−"), verdict


CLAIMS = (
    against("improves on SFT", ABSTRACT, "light SFT, families with demonstrations", "ppo/eos", "sft/light", WITH),
    against("generalises beyond the demonstrations", ABSTRACT, "light SFT, families without demonstrations", "ppo/eos", "sft/light"),
    Claim("consistently outperforms SFT", ABSTRACT, "every SFT, without demonstrations", tuple(sum(STARTS.values(), ())), _everywhere),
    Claim(
        "particularly where demonstrations are scarce",
        ABSTRACT,
        "gain without demonstrations from 16 and from 1024",
        (*FEW, *MANY),
        _scarce,
    ),
    against("outperforms SFT of the same compute", EXPERIMENTS, "continued SFT, with demonstrations", "ppo/eos", "continued/eos", WITH),
    against("… beyond the demonstrations", EXPERIMENTS, "continued SFT, without demonstrations", "ppo/eos", "continued/eos"),
    against("outperforms SFT at a low learning rate", EXPERIMENTS, "a tenth of the rate, without demonstrations", "ppo/eos", "sft/low-lr"),
    against(
        "works with minimal overlap of demonstrations and prompts",
        EXPERIMENTS,
        "prompts of the other families alone, without demonstrations",
        "ppo/minimal",
        "sft/light",
    ),
    Claim(
        "the reward at EOS avoids the length bias of token rewards",
        EXPERIMENTS,
        "growth of the rollouts over PPO: token and EOS placement; answers of 4 to 5 tokens can hardly show it",
        ("ppo/token", "ppo/eos"),
        _longer,
    ),
    against(
        "outperforms PPO with a reward model of preferences",
        EXPERIMENTS,
        "a model of right and wrong answers on all families (labels that SRPPO never sees)",
        "ppo/eos",
        "ppo/reward-model",
    ),
    against("… with demonstrations", EXPERIMENTS, "the same", "ppo/eos", "ppo/reward-model", WITH),
    against(
        "… of preferences on the demonstrated families",
        EXPERIMENTS,
        "a model of right and wrong answers on the demonstrated families",
        "ppo/eos",
        "ppo/narrow-model",
    ),
)

"""The paper's claims (arXiv 2510.21090, abstract), each beside what the embedded world says of it."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.evidence.figures import Rows, curve, gain, seeds_of

WITH, WITHOUT = "with_demonstrations", "without_demonstrations"
Answer = tuple[str, str, str]  # setting, figure, holds or not


def claims_table(rows: Rows) -> list[str]:
    """A row a claim; claims whose runs are not there yet are left out."""
    lines = [
        "## The paper's claims",
        "",
        "Holds: the 95 % interval of the paired difference lies on the claim's side. Points of sampled accuracy.",
        "",
        "| claim | our setting | our figure | verdict |",
        "|---|---|---|---|",
    ]
    for claim, (needed, answer) in CLAIMS.items():
        if all(seeds_of(rows, name) for name in needed):
            lines.append(f"| {claim} | " + " | ".join(answer(rows)) + " |")
    return lines


def _verdict(sign: int) -> str:
    return {1: "**holds**", 0: "not clear", -1: "**does not hold**"}[sign]


def _against(name: str, other: str, group: str, setting: str) -> Callable[[Rows], Answer]:
    def answer(rows: Rows) -> Answer:
        found = gain(rows, name, other, group)
        return setting, found.points(), _verdict(found.sign)

    return answer


def _sfts(rows: Rows) -> Answer:
    """Over all SFT settings, against the SFT it starts from."""
    cases = {
        "light": ("ppo/eos", "sft/light"),
        "medium": ("ppo/medium", "sft/medium"),
        "heavy": ("ppo/heavy", "sft/heavy"),
        **{f"{n} demonstrations": (f"ppo/{n}", f"sft/{n}") for n in (16, 256, 1024)},
    }
    found = {label: gain(rows, *names, WITHOUT) for label, names in cases.items() if seeds_of(rows, *names)}
    better = [label for label, g in found.items() if g.sign > 0]
    worse = [label for label, g in found.items() if g.sign < 0]
    figure = "; ".join(f"{label} {g.points()}" for label, g in found.items())
    if len(better) == len(found):
        return "every SFT above, without demonstrations", figure, "**holds**"
    words = f"**holds only** for {', '.join(better)}" if better else "**does not hold**"
    return "every SFT above, without demonstrations", figure, words + (f"; worse for {', '.join(worse)}" if worse else "")


def _scarce(rows: Rows) -> Answer:
    few, many = gain(rows, "ppo/16", "sft/16", WITHOUT), gain(rows, "ppo/1024", "sft/1024", WITHOUT)
    apart = few.low > many.high, few.high < many.low
    verdict = "**holds**" if apart[0] else "**does not hold**" if apart[1] else "not clear"
    return "gain without demonstrations at 16 and at 1024", f"{few.points()} and {many.points()}", verdict


def _length(rows: Rows) -> Answer:
    ends = {name: curve(rows, name, "length") for name in ("ppo/token", "ppo/eos")}
    drift = {name: float(c[-1] / c[0] - 1) for name, c in ends.items()}
    figure = f"length over the rounds: token {100 * drift['ppo/token']:+.0f} %, EOS {100 * drift['ppo/eos']:+.0f} %".replace("-", "−")
    longer = drift["ppo/token"] > 0.05 and drift["ppo/token"] > drift["ppo/eos"] + 0.05
    words = "**holds**" if longer else "**does not hold** here: neither grows" if max(drift.values()) < 0.05 else "not clear"
    return "token against EOS placement, short answers", figure, words


CLAIMS: dict[str, tuple[list[str], Callable[[Rows], Answer]]] = {
    "improves on SFT from demonstrations alone": (
        ["ppo/eos", "sft/light"],
        _against("ppo/eos", "sft/light", WITH, "light SFT, families with demonstrations"),
    ),
    "generalises beyond the demonstrations": (
        ["ppo/eos", "sft/light"],
        _against("ppo/eos", "sft/light", WITHOUT, "light SFT, families without demonstrations"),
    ),
    "consistently outperforms SFT": (["ppo/eos", "sft/light", "ppo/heavy", "ppo/medium"], _sfts),
    "outperforms SFT with the same compute": (
        ["ppo/eos", "continued/eos"],
        _against("ppo/eos", "continued/eos", WITHOUT, "continued SFT, families without demonstrations"),
    ),
    "outperforms SFT at a low learning rate": (
        ["ppo/eos", "sft/low-lr"],
        _against("ppo/eos", "sft/low-lr", WITHOUT, "a tenth of the rate, without demonstrations"),
    ),
    "works with minimal overlap of demonstrations and prompts": (
        ["ppo/minimal", "sft/light"],
        _against("ppo/minimal", "sft/light", WITHOUT, "prompts of the other families alone, without demonstrations"),
    ),
    "most effective where demonstrations are scarce": (["ppo/16", "sft/16", "ppo/1024", "sft/1024"], _scarce),
    "the reward at EOS avoids the length bias of token rewards": (["ppo/token", "ppo/eos"], _length),
    "no worse than PPO with a reward model of preferences": (
        ["ppo/eos", "ppo/reward-model"],
        _against("ppo/eos", "ppo/reward-model", WITHOUT, "a model of right and wrong answers on all families (labels SRPPO never sees)"),
    ),
    "… of preferences on the demonstrated families": (
        ["ppo/eos", "ppo/narrow-model"],
        _against("ppo/eos", "ppo/narrow-model", WITHOUT, "a model of right and wrong answers on the demonstrated families"),
    ),
}

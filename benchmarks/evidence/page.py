"""docs/results/evidence.md and its figures, from the rows of the result file: a section a question, then the paper's claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from benchmarks.evidence.cases import FREE, QUESTIONS, ROUNDS, TUNING_SEEDS, start_of, title
from benchmarks.evidence.claims import claims_table
from benchmarks.evidence.figures import GROUPS, Rows, accuracy, curve, each_gain, gain, length, lost, seeds_of
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HEADINGS = {
    "methods": "Methods side by side",
    "overlap": "Which prompts PPO is run on",
    "demonstrations": "How many demonstrations",
    "strength": "How strong an SFT",
    "beta": "Which β",
    "numerator": "A separate checkpoint as the reward's numerator",
    "tuning": "Full tuning and LoRA",
}
LINES = {"SFT": "#7F7F7F", "SRPPO": "#D55E00", "continued SFT": "#56B4E9"}
COLOURS = {"with_demonstrations": "#0072B2", "without_demonstrations": "#D55E00"}


def write_page(rows: Rows, folder: Path, seeds: Sequence[int]) -> Path:
    """Write evidence.md into `folder` and the figures into folder/evidence/, from the rows of these seeds; the page's place."""
    plt.switch_backend("Agg")
    rows = {key: row for key, row in rows.items() if key[1] in seeds}
    images = folder / "evidence"
    images.mkdir(parents=True, exist_ok=True)
    lines = _head(rows)
    for question, heading in HEADINGS.items():
        names = [name for name in QUESTIONS[question] if seeds_of(rows, name)]
        if not names:
            continue
        lines += [f"## {heading}", "", f"`python -m benchmarks.evidence {question}`", "", *table(rows, names), ""]
        figure = draw(rows, question, names)
        if figure is not None:
            figure.savefig(images / f"{question}.png", dpi=110, bbox_inches="tight", facecolor="white")
            plt.close(figure)
            lines += [f"![{heading}](evidence/{question}.png)", ""]
    lines += _rivals(rows) + _length_bias(rows, images) + claims_table(rows)
    page = folder / "evidence.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def _head(rows: Rows) -> list[str]:
    seconds = sum(row.get("wall_seconds") or 0 for row in rows.values())
    seeds = sorted({seed for _, seed in rows})
    return [
        "# Evidence from the embedded world",
        "",
        f"`python -m benchmarks.evidence`: seeds {', '.join(map(str, seeds))} (each draws demonstrations, prompts and evaluation",
        f"words anew), {ROUNDS} rounds of PPO of 128 prompts. The runs took {seconds / 60:.0f} minutes of one core in all.",
        f"Settings were chosen on seed {' and '.join(map(str, TUNING_SEEDS))} (`--choices`), which no table contains.",
        "",
        "Accuracy in percent on 160 prompts a seed of the four families with demonstrations and 240 of the six without, two samples a",
        "prompt at temperature 1, and greedy. Intervals: 95 %, the wider of a bootstrap over seeds and prompts",
        "and Student's over the seeds; gains are paired, over the SFT that the training began with. Length: tokens of a sample, EOS",
        "included.",
        "Lost: of the prompts that the base answers right greedily, the share that the model no longer does.",
        "Compute: of the training, thousands of tokens passed through a model, a backward pass counted as two.",
        "",
    ]


def table(
    rows: Rows,
    names: list[str],
    groups: dict[str, str] = GROUPS,
    called: Callable[[str], str] = title,
    begun: Callable[[str], str] = start_of,
) -> list[str]:
    columns = ["", *(c for words in groups.values() for c in (f"{words}: sampled", "greedy", "length"))]
    columns += [*(f"gain {words}" for words in groups.values()), f"lost {' / '.join(groups.values())}", "compute", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in names:
        cells = []
        greedy_is_own = not name.startswith("free/") or FREE[name.removeprefix("free/")].how in ("logits", "weights")
        for group in groups:
            greedy = f"{100 * accuracy(rows, name, group, 'greedy').value:.1f}" if greedy_is_own else "–"
            cells += [f"{100 * accuracy(rows, name, group).value:.1f}", greedy, f"{length(rows, name, group):.1f}"]
        start = begun(name)
        compared = not name.startswith("sft/") and name != "base" and seeds_of(rows, name, start)
        gains = [gain(rows, name, start, group).points() if compared else "" for group in groups]
        known = greedy_is_own and seeds_of(rows, name, "base")
        gone = [f"{100 * found.value:.0f}" if known and (found := lost(rows, name, group)) else "–" for group in groups]
        shown = "0 / 0" if name == "base" else " / ".join(gone)
        lines.append(
            f"| {called(name)} | " + " | ".join([*cells, *gains, shown, compute(rows, name), str(len(seeds_of(rows, name)))]) + " |"
        )
    return lines


def compute(rows: Rows, name: str) -> str:
    """Mean over seeds of the tokens passed through a model, in thousands, a backward pass for two."""
    found = [rows[name, seed].get("passes") for seed in seeds_of(rows, name)]
    told = [passes for passes in found if passes]
    return f"{np.mean(told) / 1000:.0f}" if told else "–"


def differences(rows: Rows, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A row a pair of names: the first minus the second."""
    lines = ["| | over | with | without |", "|---|---|---|---|"]
    for name, other in pairs:
        if seeds_of(rows, name, other):
            cells = " | ".join(gain(rows, name, other, group).points() for group in GROUPS)
            lines.append(f"| {title(name)} | {title(other)} | {cells} |")
    return lines


def _rivals(rows: Rows) -> list[str]:
    """SRPPO against what costs the same or less, and its variants against the plain one."""
    starts = ("eos", "16", "256", "1024", "medium", "heavy")
    variants = ("token", "length", "shift", "beta-0.3", "beta-0.5", "beta-2", "guard", "guarded", "card", "after")
    return [
        "## SRPPO against its rivals",
        "",
        "Points of sampled accuracy, paired over prompts and seeds. Continued SFT ends where the held-out loss is lowest, so its compute",
        "is about PPO's at most.",
        "",
        *differences(rows, [(f"ppo/{name}", f"continued/{name}") for name in starts]),
        "",
        *differences(rows, [("ppo/eos", f"free/{name}") for name in FREE]),
        "",
        *differences(rows, [("ppo/eos", "ppo/reward-model"), ("ppo/eos", "ppo/narrow-model")]),
        "",
        "## What helped",
        "",
        *differences(rows, [(f"ppo/{name}", "ppo/eos") for name in variants] + [("ppo/numerator", "ppo/medium")]),
        "",
        *differences(rows, [(f"ppo/{name}", "continued/eos") for name in variants] + [("ppo/numerator", "continued/medium")]),
        "",
    ]


def draw(rows: Rows, question: str, names: list[str]) -> Figure | None:
    if question == "methods":
        return _dots(rows, names)
    if question in ("demonstrations", "beta"):
        return _curves(rows, question)
    return None


def _dots(rows: Rows, names: list[str]) -> Figure:
    figure, axes = plt.subplots(figsize=(8.5, 0.34 * len(names) + 1.2), layout="constrained")
    for offset, (group, words) in zip((-0.14, 0.14), GROUPS.items()):
        for height, name in enumerate(names):
            found = accuracy(rows, name, group)
            axes.plot([100 * found.low, 100 * found.high], [height + offset] * 2, color=COLOURS[group], linewidth=3, alpha=0.4)
            label = f"{words} demonstrations" if height == 0 else None
            axes.plot(100 * found.value, height + offset, "o", color=COLOURS[group], markersize=5, label=label)
    axes.set_yticks(range(len(names)), [title(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("sampled accuracy, percent (bars: 95 % over seeds and prompts)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def _curves(rows: Rows, question: str) -> Figure | None:
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained", sharey=True)
    if question == "demonstrations":
        counts = {16: "16", 64: None, 256: "256", 1024: "1024"}
        series = {
            "SFT": {n: f"sft/{key or 'light'}" for n, key in counts.items()},
            "SRPPO": {n: f"ppo/{key or 'eos'}" for n, key in counts.items()},
            "continued SFT": {n: f"continued/{key or 'eos'}" for n, key in counts.items()},
        }
        x = "demonstrations"
    else:
        series = {"SRPPO": {0.3: "ppo/beta-0.3", 0.5: "ppo/beta-0.5", 1.0: "ppo/eos", 2.0: "ppo/beta-2"}}
        x = "β"
    drawn = False
    for panel, (group, words) in zip(panels, GROUPS.items()):
        for label, names in series.items():
            drawn |= _line(panel, rows, {at: n for at, n in names.items() if seeds_of(rows, n)}, group, label, LINES[label])
        if question == "beta" and seeds_of(rows, "sft/light"):
            panel.axhline(100 * accuracy(rows, "sft/light", group).value, color=LINES["SFT"], linestyle=":", label="SFT")
        panel.set_xscale("log", base=2)
        ticks = sorted({at for names in series.values() for at in names})
        panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
        panel.set_title(f"{words} demonstrations", fontsize=9)
        panel.set_xlabel(x, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("sampled accuracy, percent", fontsize=9)
    panels[1].legend(fontsize=8, frameon=False)
    return figure if drawn else None


def _line(panel: Axes, rows: Rows, names: dict[float, str], group: str, label: str, colour: str) -> bool:
    if not names:
        return False
    found = [accuracy(rows, name, group) for name in names.values()]
    middle = [100 * f.value for f in found]
    spread = [[100 * (f.value - f.low) for f in found], [100 * (f.high - f.value) for f in found]]
    panel.errorbar(list(names), middle, spread, marker="o", color=colour, capsize=2, label=label)
    return True


def _length_bias(rows: Rows, images: Path) -> list[str]:
    """Token against EOS placement, with the length curves."""
    names = [n for n in ("ppo/eos", "ppo/token", "ppo/length", "ppo/shift") if seeds_of(rows, n)]
    if len(names) < 2:
        return []
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.0), layout="constrained")
    for name, colour in zip(names, ("#D55E00", "#0072B2", "#009E73", "#CC79A7")):
        for panel, what in zip(panels, ("length", "kl")):
            found = curve(rows, name, what)
            panel.plot(range(1, len(found) + 1), found, color=colour, label=title(name).removeprefix("SRPPO, "))
    for panel, words in zip(panels, ("mean length of the rollouts, tokens", "KL to the SFT, nats a response")):
        panel.set_xlabel("PPO round", fontsize=9)
        panel.set_ylabel(words, fontsize=9)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(images / "length.png", dpi=110, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    lines = ["## Length bias", "", "| placement | length, first round | last round | gain without, each seed |", "|---|---|---|---|"]
    for name in names:
        found = curve(rows, name, "length")
        each = ", ".join(f"{100 * g:+.1f}" for g in each_gain(rows, name, "sft/light", "without_demonstrations")).replace("-", "−")
        lines.append(f"| {title(name)} | {found[0]:.2f} | {found[-1]:.2f} | {each} |")
    return [*lines, "", "![Length](evidence/length.png)", ""]

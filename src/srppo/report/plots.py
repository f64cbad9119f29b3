"""The plots of a run, each a PNG. Colours are Okabe and Ito's (2008), which colour-blind readers can tell apart."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from srppo.report.record import Record
from srppo.report.speed import PHASES
from srppo.titles import STAGES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STAGE_COLOURS = {"base": "#7F7F7F", "sft": "#0072B2", "sft_continued": "#56B4E9", "srppo": "#D55E00"}
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "text.parse_math": False,  # a group called $a$ is a name, not a formula
}
SIZE = (6.4, 3.4)  # inches
GROUPS_SHOWN = 6  # in one plot


@dataclass(frozen=True)
class Plot:
    name: str  # the file's, without .png
    caption: str
    png: bytes


def draw_all(record: Record) -> list[Plot]:
    """The plots that the run has figures for."""
    from srppo.report.card_plots import CARD_PLOTS  # it draws with what this file has

    plots = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a group name in a script that the font lacks
        for name, (draw, caption) in (PLOTS | CARD_PLOTS).items():
            figure = draw(record)
            if figure is not None:
                stream = io.BytesIO()
                figure.savefig(stream, format="png", dpi=130, bbox_inches="tight", facecolor="white")
                plots.append(Plot(name, caption, stream.getvalue()))
    return plots


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _legend(axes: Axes) -> None:
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=9, loc="best")


def _line(axes: Axes, record: Record, stage: str, key: str, label: str, **style: Any) -> bool:
    x, y = record.series(stage, key)
    if x:
        axes.plot(x, y, label=label, marker="o" if len(x) <= 40 else None, **style)
    return bool(x)


def draw_stages(record: Record) -> Figure | None:
    """A panel for each group: the sampled accuracy of each stage with its interval, and the greedy one."""
    scored = [g for g in record.groups if any(record.results(s).get(g, {}).get("sampled") is not None for s in STAGES)]
    if not scored:
        return None
    shown, stages = scored[:GROUPS_SHOWN], record.stages
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(max(6.4, 3.2 * columns), rows * (0.9 + 0.42 * len(stages))), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel, group in zip(panels, shown):
        for height, stage in enumerate(stages):
            result, colour = record.results(stage).get(group, {}), STAGE_COLOURS[stage]
            middle, low, high = (result.get(k) for k in ("sampled", "sampled_low", "sampled_high"))
            if middle is None:
                continue
            if low is not None and high is not None:
                panel.plot([low, high], [height, height], color=colour, linewidth=3, alpha=0.45, solid_capstyle="butt")
            panel.plot(middle, height, "o", color=colour, markersize=7, label="sampled" if height == 0 else None)
            if result.get("greedy") is not None:
                panel.plot(
                    result["greedy"], height, "D", color=colour, markersize=6, fillstyle="none", label="greedy" if height == 0 else None
                )
        panel.set_title(readable(group), fontsize=10)
        panel.set_yticks(range(len(stages)), [record.titles[s] for s in stages])
        panel.set_ylim(len(stages) - 0.5, -0.5)
        panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.grid(axis="y", visible=False)
    low, high = panels[0].get_xlim()
    panels[0].set_xlim(max(low, -0.03), min(high, 1.03))
    figure.supxlabel("accuracy (filled: sampled at temperature 1, bar: 95 % interval; hollow: greedy)", fontsize=9)
    return figure


def draw_accuracy(record: Record) -> Figure | None:
    """Accuracy of the evaluations during PPO, by group."""
    keys = dict.fromkeys(k for r in record.metrics for k in r if k.startswith("eval/") and k.endswith(("/sampled", "/greedy")))
    groups = list(dict.fromkeys(k.split("/", 1)[1].rsplit("/", 1)[0] for k in keys))[:GROUPS_SHOWN]
    if not groups:
        return None
    figure, axes = _axes("Accuracy during PPO", "PPO iteration", "accuracy")
    for group, colour in zip(groups, COLOURS):
        _line(axes, record, "ppo", f"eval/{group}/sampled", f"{readable(group)}, sampled", color=colour)
        _line(axes, record, "ppo", f"eval/{group}/greedy", f"{readable(group)}, greedy", color=colour, linestyle="--", fillstyle="none")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _legend(axes)
    return figure


def draw_reward(record: Record) -> Figure | None:
    unit = "a response" if record.learned_reward else "nats a response"
    figure, axes = _axes("Reward of the rollouts", "PPO iteration", unit)
    score = "score of the reward model" if record.learned_reward else "score: log π_sft − log π_base"
    drawn = _line(axes, record, "ppo", "objective/scores", score, color=COLOURS[1])
    drawn |= _line(axes, record, "ppo", "objective/rlhf_reward", "score − β · KL", color=COLOURS[0], linestyle="--", fillstyle="none")
    _legend(axes)
    return figure if drawn else None


def draw_kl(record: Record) -> Figure | None:
    reward = record.config.get("reward") or {}
    anchor = {"sft": "the SFT model", "base": "the base model"}.get(str(reward.get("kl_anchor")), "the anchor")
    figure, axes = _axes(f"How far the policy is from {anchor}", "PPO iteration", "KL, nats a response")
    drawn = _line(axes, record, "ppo", "objective/kl", "KL", color=COLOURS[0])
    if reward.get("kl_target"):
        axes.axhline(reward["kl_target"], color=COLOURS[1], linestyle=":", label="target")
    _legend(axes)
    return figure if drawn else None


def draw_length(record: Record) -> Figure | None:
    figure, axes = _axes("Length of the rollouts", "PPO iteration", "tokens a response, EOS included")
    drawn = _line(axes, record, "ppo", "completions/mean_length", "mean", color=COLOURS[2])
    axes.set_ylim(bottom=0)
    return figure if drawn else None


def draw_loss(record: Record) -> Figure | None:
    """Training and held-out loss of the SFT, and of the continued SFT to its right."""
    figure, axes = _axes("Loss of the supervised training", "optimizer step", "nats a token")
    drawn, start = False, 0.0
    for stage, title, colour in (("sft", "SFT", STAGE_COLOURS["sft"]), ("sft_continued", "continued SFT", COLOURS[4])):
        x, y = record.series(stage, "loss")
        if x:
            axes.plot([start + v for v in x], y, color=colour, linewidth=1.1, alpha=0.55, label=f"{title}, training")
        held_x, held_y = _either(record, stage, ("heldout_nll", "heldout_loss"))
        if held_x:
            axes.plot([start + v for v in held_x], held_y, "s-", color=colour, label=f"{title}, held-out")
        drawn |= bool(x or held_x)
        start += max([0.0, *x, *held_x])
    _legend(axes)
    return figure if drawn else None


def draw_speed(record: Record) -> Figure | None:
    """Seconds of each round, its phases on top of each other. The round that a profiler slowed down is left out."""
    rows = [r for r in record.metrics if r.get("stage") == "ppo" and "timing/update" in r and not r.get("timing/profiled")]
    x = [float(r.get("iteration") or 0) for r in rows]
    if not rows:
        return None
    figure, axes = _axes("Time of the rounds", "PPO iteration", "seconds")
    below = [0.0] * len(rows)
    for (phase, title), colour in zip(PHASES.items(), COLOURS):
        seconds = [float(r.get(f"timing/{phase}") or 0.0) for r in rows]
        if any(seconds):
            axes.bar(x, seconds, bottom=below, width=0.85, color=colour, label=title)
            below = [a + b for a, b in zip(below, seconds)]
    _legend(axes)
    return figure


def _either(record: Record, stage: str, keys: tuple[str, ...]) -> tuple[list[float], list[float]]:
    return next((s for s in (record.series(stage, k) for k in keys) if s[0]), ([], []))


def readable(group: str) -> str:
    """A group's name for people."""
    return "all prompts" if group == "all" else group.replace("_", " ")


PLOTS: dict[str, tuple[Callable[[Record], Figure | None], str]] = {
    "stages": (
        draw_stages,
        "Accuracy of each stage on the evaluation prompts. The table compares prompt by prompt, and so sees more.",
    ),
    "accuracy": (
        draw_accuracy,
        "Evaluations during PPO, on fewer prompts than the table's. Falling while the reward rises is over-optimisation.",
    ),
    "reward": (draw_reward, "The coherent reward. It must rise; that it rises does not say that the answers get better."),
    "kl": (draw_kl, "A KL that grows without end means β is too small for the number of iterations."),
    "length": (draw_length, "Length follows reward where the reward has a length bias."),
    "speed": (draw_speed, "Where the time of each round went. A checkpoint counts for the round after it."),
    "loss": (draw_loss, "Cross-entropy of the demonstrations' responses. Held-out loss that rises again is overfitting."),
}

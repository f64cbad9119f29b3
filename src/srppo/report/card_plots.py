"""The plots of the reward card, and of the guard that watches PPO on held-out demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from srppo.report.card_words import Row, group, items, part, plain_number, real
from srppo.report.plots import COLOURS, GROUPS_SHOWN, STAGE_COLOURS
from srppo.report.record import Record
from srppo.titles import STAGES

HELDOUT = "held-out"
HEIGHT = 3.3  # inches
SPREADS_SHOWN = 16  # groups
SHADED = 2  # intervals of more groups would hide each other
Values = list[tuple[float, float, float | None, float | None]]  # beta, value, and its interval


def draw_card_beta(record: Record) -> Figure | None:
    """Predicted gain, chance of the right answer and expected length against beta, a panel for each that the card has."""
    rows = sorted((r for r in items(record.card, "betas") if (real(r.get("beta")) or 0) > 0), key=lambda r: r["beta"])
    groups = list(dict.fromkeys(str(r.get("group")) for r in rows if r.get("group") != HELDOUT))[:GROUPS_SHOWN]
    colours = {HELDOUT: "#000000"} | dict(zip(groups, COLOURS))
    panels: list[tuple[str, str, Callable[[Row], Any]]] = [
        ("Predicted gain", "nats a response", lambda r: r.get("gain")),
        ("Accuracy", "by the scoring function", lambda r: r.get("accuracy")),
        ("Demonstrations matched", "chance, token for token", lambda r: {"value": r.get("match")}),
        ("Expected length", "tokens a response", lambda r: {"value": r.get("length")}),
    ]
    found = [(*panel, {g: _values(rows, g, panel[2]) for g in colours}) for panel in panels]
    found = [panel for panel in found if any(panel[3].values())]
    if not found:
        return None
    columns = 2 if len(found) > 1 else 1
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(9.2 if columns > 1 else 6.4, 0.4 + 2.7 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for spare in axes[len(found) :]:
        spare.set_visible(False)
    for panel, (title, unit, _, series) in zip(axes, found):
        for name, values in series.items():
            _interval_line(panel, values, colours[name], shaded=name == HELDOUT or len(groups) <= SHADED)
        panel.set(title=title, ylabel=unit, xlabel="β (smaller moves further)")
        _beta_axis(panel, rows, real(part(record.card, "decision").get("beta")))
        if title in ("Accuracy", "Demonstrations matched"):
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        if title == "Predicted gain":
            panel.axhline(0, color="#888888", linewidth=1)
    names = [g for g in colours if any(series[g] for *_, series in found)]
    handles = [Line2D([], [], color=colours[g], marker="o", label="held-out demonstrations" if g == HELDOUT else group(g)) for g in names]
    handles.append(Line2D([], [], color="#888888", linestyle="--", label="β that PPO uses"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=9)
    return figure


def _values(rows: list[Row], name: str, pick: Callable[[Row], Any]) -> Values:
    out: Values = []
    for row in rows:
        found = pick(row)
        value = real(found.get("value")) if isinstance(found, dict) else None
        if str(row.get("group")) == name and value is not None:
            out.append((float(row["beta"]), value, real(found.get("low")), real(found.get("high"))))
    return out


def _interval_line(axes: Axes, values: Values, colour: str, shaded: bool) -> None:
    axes.plot([v[0] for v in values], [v[1] for v in values], "o-", color=colour)
    if not shaded:
        return
    known = [(x, low, high) for x, _, low, high in values if low is not None and high is not None]
    axes.fill_between([k[0] for k in known], [k[1] for k in known], [k[2] for k in known], color=colour, alpha=0.13, linewidth=0)


def _beta_axis(axes: Axes, rows: list[Row], chosen: float | None) -> None:
    axes.set_xscale("log")
    ticks = sorted({float(r["beta"]) for r in rows})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([plain_number(t) for t in ticks], fontsize=8)
    if chosen is not None and chosen > 0:
        axes.axvline(chosen, color="#888888", linestyle="--", linewidth=1.4)


def draw_card_spread(record: Record) -> Figure | None:
    """The reward's quantiles of each author's samples on each group, as horizontal ranges."""
    rows = [r for r in items(record.card, "spreads") if _quantiles(r)]
    groups = list(dict.fromkeys(str(r.get("group")) for r in rows))[:SPREADS_SHOWN]
    if not groups:
        return None
    figure = Figure(figsize=(6.4, 1.2 + 0.5 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for height, name in enumerate(groups):
        for row in (r for r in rows if str(r.get("group")) == name):
            author = "base" if row.get("author") == "base" else "sft"
            y, colour = height + (0.17 if author == "base" else -0.17), STAGE_COLOURS[author]
            low, lower, middle, upper, high = _quantiles(row)
            axes.plot([low, high], [y, y], color=colour, linewidth=1.5, alpha=0.6, solid_capstyle="butt")
            axes.plot([lower, upper], [y, y], color=colour, linewidth=6, alpha=0.45, solid_capstyle="butt")
            axes.plot(middle, y, "o", color=colour, markersize=6)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set(title="The reward of the models' own answers", xlabel="nats a response (dot: median, bar: middle half, line: 5 % to 95 %)")
    axes.set_yticks(range(len(groups)), [group(g) for g in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    handles = [Line2D([], [], color=STAGE_COLOURS[a], marker="o", label=f"samples of {STAGES[a]}") for a in ("sft", "base")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _quantiles(row: Row) -> list[float]:
    """The five of them, or none."""
    found = row.get("quantiles")
    values = [v for q in found if (v := real(q)) is not None] if isinstance(found, list) else []
    return values if len(values) == 5 else []


def draw_guard(record: Record) -> Figure | None:
    """What the guard saw: its criterion and the held-out loss, with the round whose policy was kept."""
    criterion, loss = (record.series("ppo", f"guard/{key}") for key in ("criterion", "heldout_nll"))
    panels = [
        (t, u, s)
        for t, u, s in (
            ("What the guard goes by", "mean probability of a demonstration's token", criterion),
            ("Loss of held-out demonstrations", "nats a token", loss),
        )
        if s[0]
    ]
    if not panels:
        return None
    kept = real(part(record.summary, "ppo_training").get("kept_round"))
    figure = Figure(figsize=(4.6 * len(panels) if len(panels) > 1 else 6.4, HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False).flatten()
    for panel, (title, unit, (x, y)), colour in zip(axes, panels, COLOURS):
        panel.plot(x, y, "o-", color=colour)
        if kept is not None:
            panel.axvline(kept, color=COLOURS[2], linestyle="--", label=f"kept: round {kept:.0f}" if kept else "kept: the SFT model")
            panel.legend(fontsize=9, loc="best")
        panel.set(title=title, xlabel="PPO iteration", ylabel=unit)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


CARD_PLOTS: dict[str, tuple[Callable[[Record], Figure | None], str]] = {
    "card_beta": (
        draw_card_beta,
        "What PPO would move towards at each β, estimated from samples of the model it starts from; shaded: 95 % intervals. "
        "A predicted gain above 0 makes held-out demonstrations likelier.",
    ),
    "card_spread": (
        draw_card_spread,
        "The SFT model's answers usually lie right of 0 and the base's left of it. "
        "A group whose ranges lie elsewhere than the held-out ones shows where the reward behaves differently.",
    ),
    "guard": (
        draw_guard,
        "Looks at held-out demonstrations during PPO. When they stop getting better, more rounds only please the reward.",
    ),
}

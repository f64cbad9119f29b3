"""The reward card in the terminal: the report's sentences and tables, in text."""

from __future__ import annotations

import textwrap

from srppo.diagnose.reward_card import RewardCard
from srppo.progress import Progress

WIDTH = 78  # characters of a line of prose
FEW_GROUPS = 2  # so many get a table of every beta; more get one table of the chosen beta
PREVIEWED = 3  # groups of the preview


def tell(card: RewardCard, progress: Progress) -> None:
    """The verdict, its reasons, what PPO will use, and the tables."""
    from srppo.report import card_tables as tables  # with it comes matplotlib, which is slow to import
    from srppo.report.card_words import items
    from srppo.report.reward_card import NATS, basis_of, choice_of, headline_of, length_of, reasons_of

    said = card.to_dict()

    def note(*texts: str) -> None:
        for text in texts:
            indent = "  " if text.startswith("- ") else ""
            progress.note("\n".join(textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)))

    def show(table: tables.Table | None) -> None:
        if table is not None:
            rows = [[f"{c.text} ±{c.half}" if c.half else c.text for c in row] for row in table.rows]
            if table.chosen is not None:
                rows[table.chosen][0] = f"▸{rows[table.chosen][0]}"
            progress.table(table.title, table.columns, rows)
            if table.note:
                note(table.note, "")

    (progress.note if card.verdict == "go" else progress.warn)(f"Reward card: {headline_of(said)}")
    note(
        *(f"- {line}" for line in reasons_of(said)),
        "",
        basis_of(said),
        choice_of(said),
        f"{NATS} Behind ±: the wider side of a 95 % interval. ▸: what PPO will use.",
        "",
    )
    show(tables.preferences(said))
    show(tables.heldout(said))
    by_group = tables.groups(said)
    for table in by_group if len(by_group) <= FEW_GROUPS else [tables.chosen_beta(said)]:
        show(table)
    show(tables.spreads(said))
    note(*length_of(said), "")
    if len(items(said, "candidates")) > 1:
        show(tables.candidates(said))
    names = tables.preview_groups(said)
    show(tables.preview(said, names[:PREVIEWED]))
    if len(names) > PREVIEWED:
        note(f"{len(names) - PREVIEWED} more groups are in diagnose.json and the report.")

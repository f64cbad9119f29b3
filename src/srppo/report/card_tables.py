"""The reward card's tables, the same for the terminal and the report.

They are made from RewardCard.to_dict(), so that a card read back from diagnose.json, whatever it lacks, reads like a fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from srppo.report.card_words import (
    NONE,
    Cell,
    Row,
    author,
    checkpoint,
    estimate,
    group,
    items,
    line,
    nats,
    part,
    plain_number,
    points,
    real,
    share,
    short_percent,
    tokens,
)

Columns = dict[str, Callable[[Row], Cell]]


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""  # what the columns mean
    chosen: int | None = None  # the row of what PPO will use


def preferences(card: Row) -> Table | None:
    columns: Columns = {
        "against samples of": lambda r: Cell(f"{author(r.get('against'))}, {_lengths(r.get('bucket'))}"),
        "preferred": lambda r: share(r.get("auc")),
        "margin": lambda r: estimate(r.get("margin"), sign=True),
        "prompts": lambda r: Cell(plain_number(part(r, "auc").get("n"))),
    }
    note = (
        "preferred: how often a held-out demonstration earns more than a model's own answer to the same prompt (the AUC; 50 % is chance). "
        "margin: by how many nats on average."
    )
    return _table(
        "Does the reward prefer demonstrations?",
        columns,
        [r for r in items(card, "preferences") if real(part(r, "auc").get("value")) is not None],
        note,
    )


_BETA_NOTE = (
    "An estimate from weighted samples of the model that PPO starts from. basis: share of the samples that carry the row; the lower, "
    "the rougher. KL: how far the policy would move, in nats. length: tokens. same: chance of saying just what the demonstration says. "
    "gain: nats by which held-out demonstrations would become likelier; below 0 is harm. "
    "right: accuracy by the scoring function; points: its rise, in percentage points."
)
_EFFECT: Columns = {
    "basis": lambda r: Cell(short_percent(r.get("effective"))),
    "KL": lambda r: Cell(nats(r.get("kl"))),
    "reward": lambda r: Cell(nats(r.get("reward"))),
    "length": lambda r: Cell(tokens(r.get("length"))),
    "same": lambda r: Cell(short_percent(r.get("match"))),
    "gain": lambda r: estimate(r.get("gain"), sign=True),
    "right": lambda r: Cell(short_percent(part(r, "accuracy").get("value"))),
    "points": lambda r: points(r.get("accuracy_gain")),
}
_BETA: Columns = {"β": lambda r: Cell(plain_number(r.get("beta")))}
_GROUP: Columns = {"group": lambda r: Cell(group(r.get("group")))}


def heldout(card: Row) -> Table | None:
    return _betas(card, "held-out", "What each β would do, on prompts of held-out demonstrations", _BETA_NOTE)


def groups(card: Row) -> list[Table]:
    names = dict.fromkeys(str(r.get("group")) for r in items(card, "betas") if r.get("group") != "held-out")
    found = (_betas(card, name, f"What each β would do, on PPO prompts: {group(name)}", "") for name in names)
    return [table for table in found if table is not None]


def _betas(card: Row, name: str, title: str, note: str) -> Table | None:
    rows = sorted((r for r in items(card, "betas") if str(r.get("group")) == name), key=lambda r: real(r.get("beta")) or 0.0)
    beta = real(part(card, "decision").get("beta"))
    chosen = next((i for i, r in enumerate(rows) if beta is not None and real(r.get("beta")) == beta), None)
    return _table(title, _BETA | _EFFECT, rows, note, chosen)


def chosen_beta(card: Row) -> Table | None:
    """Every group at the beta that PPO will use, or the nearest one looked at."""
    rows = [r for r in items(card, "betas") if r.get("group") != "held-out" and (real(r.get("beta")) or 0) > 0]
    beta = real(part(card, "decision").get("beta"))
    if not rows or not beta or beta < 0:
        return None
    nearest = min((float(r["beta"]) for r in rows), key=lambda b: abs(math.log(b / beta)))
    title = f"What β {plain_number(nearest)} would do, by group of PPO prompts"
    return _table(title, _GROUP | _EFFECT, [r for r in rows if r["beta"] == nearest], "")


def spreads(card: Row) -> Table | None:
    def quantile(i: int) -> Callable[[Row], Cell]:
        return lambda r: Cell(nats(found[i]) if isinstance(found := r.get("quantiles"), list) and len(found) == 5 else NONE)

    columns: Columns = {
        "samples of, on": lambda r: Cell(f"{author(r.get('author'))}, {group(r.get('group'))}"),
        "mean": lambda r: Cell(nats(r.get("mean"))),
        "5 %": quantile(0),
        "median": quantile(2),
        "95 %": quantile(4),
        "length": lambda r: Cell(tokens(r.get("length"))),
        "ends": lambda r: Cell(short_percent(r.get("ends"))),
        "samples": lambda r: Cell(plain_number(r.get("n"))),
    }
    order = list(dict.fromkeys(str(r.get("group")) for r in items(card, "spreads")))
    rows = sorted(items(card, "spreads"), key=lambda r: (order.index(str(r.get("group"))), str(r.get("author"))))
    note = "5 % of the samples earn less than the 5 % column, 5 % more than the 95 % one. ends: share that ends by itself, with EOS."
    return _table("The reward of the models' own answers", columns, rows, note)


def candidates(card: Row) -> Table | None:
    columns: Columns = {
        "start, reward from": lambda r: Cell(f"{checkpoint(r.get('start'), brief=True)}, {checkpoint(r.get('numerator'), brief=True)}"),
        "preferred": lambda r: share(r.get("auc")),
        "best β": lambda r: Cell(plain_number(r.get("beta"))),
        "gain": lambda r: estimate(r.get("gain"), sign=True),
        "loss now": lambda r: Cell(nats(r.get("start_nll"))),
        "predicted": lambda r: Cell(nats(r.get("predicted_nll"))),
    }
    rows = items(card, "candidates")
    note = (
        "loss now: minus log-likelihood of the held-out demonstrations under the start, nats a response; predicted: after PPO. "
        "Lower is better."
    )
    return _table("Which SFT checkpoints?", columns, rows, note, next((i for i, r in enumerate(rows) if r.get("chosen") is True), None))


def preview_groups(card: Row) -> list[str]:
    return list(dict.fromkeys(str(r.get("group")) for r in items(card, "preview")))


def preview(card: Row, names: list[str]) -> Table | None:
    """Of these groups."""
    columns: Columns = {
        "group: model": lambda r: Cell(f"{group(r.get('group'))}: {author(r.get('name'))}"),
        "reward": lambda r: Cell(nats(r.get("reward"))),
        "length": lambda r: Cell(tokens(r.get("length"))),
        "ends": lambda r: Cell(short_percent(r.get("ends"))),
        "right": lambda r: Cell(short_percent(r.get("accuracy"))),
        "same": lambda r: Cell(short_percent(r.get("match"))),
    }
    note = (
        "Beside base and SFT: what a little further in the same direction gives, without any training "
        "(logits: the models' next-token scores extrapolated; weights: the parameters themselves)."
    )
    rows = [r for name in names for r in items(card, "preview") if str(r.get("group")) == name]
    return _table("Where PPO is heading: a preview", columns, rows, note)


def _lengths(bucket: Any) -> str:
    return "all demonstrations" if bucket == "all" else f"demonstrations of {line(bucket)}"


def _table(title: str, columns: Columns, rows: list[Row], note: str, chosen: int | None = None) -> Table | None:
    """Without the columns of which nothing is known; None without rows."""
    if not rows:
        return None
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    kept = [name for i, name in enumerate(cells) if i == 0 or any(c.text != NONE for c in cells[name])]
    return Table(title, kept, [[cells[name][i] for name in kept] for i in range(len(rows))], note, chosen)

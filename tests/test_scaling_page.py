"""docs/scaling.md says what srppo plan says: rows of its tables made anew."""

from __future__ import annotations

import pytest
from benchmarks.scaling_plan import BORDER, MANY, ONE_CARD, PAGE, TABLES, Case, line


@pytest.mark.parametrize(
    ("table", "cases"),
    [
        ("one card", ONE_CARD[:1]),
        ("many", [c for c in MANY if (c.model, c.nodes) == ("70B", 8) or ("shard_size 8" in c.words and c.nodes == 2)]),
        ("border", BORDER[5:6]),
    ],
)
def test_rows_are_the_plans(table: str, cases: list[Case]) -> None:
    _, row, known = TABLES[table]
    for case in cases:
        assert case in known and line(row(case)) in PAGE.read_text(encoding="utf-8")


def test_every_table_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, (heads, _, cases) in TABLES.items():
        part = page.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
        assert part.startswith(line(heads)) and len(part.splitlines()) == len(cases) + 2

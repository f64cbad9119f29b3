"""docs/scaling.md says what srppo plan says: rows of its tables made anew."""

from __future__ import annotations

import pytest
from benchmarks.scaling_plan import MANY, ONE_CARD, PAGE, TABLES, line

LARGE = next(i for i, c in enumerate(MANY) if (c.model, c.nodes) == ("70B", 8))


@pytest.mark.parametrize(
    ("table", "number"), [("one card", 0), ("many", next(i for i, c in enumerate(MANY) if (c.model, c.nodes) == ("70B", 8)))]
)
def test_a_row_is_the_plans(table: str, number: int) -> None:
    _, row, cases = TABLES[table]
    assert cases in (ONE_CARD, MANY)
    assert line(row(cases[number])) in PAGE.read_text(encoding="utf-8")


def test_every_table_is_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, (heads, _, cases) in TABLES.items():
        part = page.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
        assert part.startswith(line(heads)) and len(part.splitlines()) == len(cases) + 2

"""Scoring functions for the recipes: score(completion, row) -> 0..1, named in a recipe as recipes.scorers:<function>."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
LAST_LINE = re.compile(r"(?:^|\n)####\s*-?\$?\d[\d,]*(?:\.\d+)?\s*$")


def hash_format(completion: str, row: dict[str, Any]) -> float:
    """1 where the completion ends with a line `#### NUMBER`, as GSM8K's solutions do, whatever the number. The row is not read.

    >>> hash_format("3 + 4 = 7\\n#### 7", {}), hash_format("The answer is 7.", {}), hash_format("#### 7 is it, or 8", {})
    (1.0, 0.0, 0.0)
    """
    return float(LAST_LINE.search(completion) is not None)


def last_number(completion: str, row: dict[str, Any]) -> float:
    """1 where the last number of the completion is the row's answer, `####` or not: what a model knows apart from the format.

    >>> last_number("3 + 4 = 7, so she has 7.0 apples.", {"answer": "#### 7"}), last_number("none", {"answer": "#### 7"})
    (1.0, 0.0)
    """
    said, wanted = _last(completion), _last(str(row["answer"]))
    return float(said is not None and said == wanted)


def _last(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None

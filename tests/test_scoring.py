"""Scorers on answers as GSM8K writes them and as models do, and the user's own functions."""

from __future__ import annotations

import doctest
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import srppo.scoring
from srppo.errors import ConfigError
from srppo.scoring import exact_match, final_number, final_value, load_scorer


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(srppo.scoring)
    assert result.attempted >= 2 and result.failed == 0


@pytest.mark.parametrize(
    "completion, row, want",
    [
        ("yes", {"answer": "yes"}, 1),
        (" yes\n", {"answer": "yes "}, 1),
        ("Yes", {"answer": "yes"}, 0),
        ("yes", {"completion": "yes"}, 1),
        ("yes", {"reference": "yes"}, 1),
        ("yes", {"answer": "no", "reference": "yes"}, 0),  # the user's own answer column decides
        ("yes", {"completion": [{"role": "assistant", "content": "yes"}], "reference": "yes"}, 1),
        ("4", {"answer": 4}, 1),
        ("", {"answer": "yes"}, 0),
    ],
)
def test_exact_match(completion: str, row: dict[str, Any], want: float) -> None:
    assert exact_match(completion, row) == want


@pytest.mark.parametrize(
    "text, value",
    [
        ("2+2=4\n#### 4", "4"),
        ("####4", "4"),
        ("#### 1,234,567", "1234567"),
        ("#### 1,234.", "1234"),
        ("#### $1,200.50 a day", "1200.50"),
        ("#### -7", "-7"),
        ("#### $-7", "-7"),
        ("#### -$7", "-7"),
        ("#### .5", "0.5"),
        ("#### 3.0", "3"),
        ("#### 10%", "10"),
        ("#### 5\nand on\n#### 6", "5"),
        ("#### five", None),
        ("the answer is 5", None),
        ("#### ", None),
        ("####\n#### 5", "5"),
    ],
)
def test_final_value(text: str, value: str | None) -> None:
    assert final_value(text) == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    "completion, row, want",
    [
        ("#### 72", {"answer": "48+24 = 72\n#### 72"}, 1),
        ("#### 72.00", {"answer": "#### 72"}, 1),
        ("72", {"answer": "#### 72"}, 0),  # without the marks the format is missed
        ("#### 72", {"reference": "#### 72"}, 1),
        ("#### 1,072", {"answer": 1072}, 1),
        ("#### 72", {"answer": "$72."}, 1),
        ("#### 71", {"answer": "#### 72"}, 0),
    ],
)
def test_final_number(completion: str, row: dict[str, Any], want: float) -> None:
    assert final_number(completion, row) == want


def test_rows_without_an_answer() -> None:
    for scorer in (exact_match, final_number):
        with pytest.raises(ConfigError, match=r"no answer to compare with .*found prompt"):
            scorer("x", {"prompt": "p"})
    with pytest.raises(ConfigError, match="holds no number: 'five'"):
        final_number("#### 5", {"answer": "five"})


def test_built_in_names() -> None:
    assert load_scorer("none") is None
    assert load_scorer("exact_match") is exact_match and load_scorer("final_number") is final_number
    with pytest.raises(ConfigError, match="'exact' is none of exact_match, final_number, none, or module:function"):
        load_scorer("exact")


def test_own_function_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "srppo_test_judge.py").write_text(
        "import numpy as np\n"
        "def half(completion, row):\n    return np.float32(0.5) if row['a'] == completion else True\n"
        "def words(completion, row):\n    return 'good'\n"
        "def nothing(completion, row):\n    pass\n"
        "def large(completion, row):\n    return 2\n"
        "def nan(completion, row):\n    return float('nan')\n"
        "def breaks(completion, row):\n    return row['b']\n"
        "def quits(completion, row):\n    raise SystemExit(3)\n"
        "def takes(completion, row):\n    return float(row.pop('a') == completion)\n"
        "number = 3\n"
    )
    scorer = load_scorer("srppo_test_judge:half")
    assert scorer is not None and scorer("x", {"a": "x"}) == 0.5 and scorer("y", {"a": "x"}) == 1.0
    for name, got in (("words", "'good'"), ("nothing", "None"), ("large", "2"), ("nan", "nan")):
        bad = load_scorer(f"srppo_test_judge:{name}")
        assert bad is not None
        with pytest.raises(ConfigError, match=f"must return a number in 0..1, got {got}"):
            bad("x", {})
    breaks = load_scorer("srppo_test_judge:breaks")
    assert breaks is not None
    with pytest.raises(ConfigError, match="failed on the completion 'x': KeyError: 'b'") as caught:
        breaks("x", {})
    assert isinstance(caught.value.__cause__, KeyError)
    quits, takes, row = load_scorer("srppo_test_judge:quits"), load_scorer("srppo_test_judge:takes"), {"a": "x"}
    assert quits is not None and takes is not None
    with pytest.raises(ConfigError, match="failed on the completion 'x': SystemExit: 3"):
        quits("x", row)
    assert [takes("x", row), takes("x", row)] == [1.0, 1.0]  # it gets a copy
    with pytest.raises(ConfigError, match=r"has no function 'haalf'; it has .*half"):
        load_scorer("srppo_test_judge:haalf")
    with pytest.raises(ConfigError, match="has no function 'number'"):
        load_scorer("srppo_test_judge:number")
    with pytest.raises(ConfigError, match="cannot import 'srppo_test_none'"):
        load_scorer("srppo_test_none:f")
    (tmp_path / "srppo_test_broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_scorer("srppo_test_broken:f")

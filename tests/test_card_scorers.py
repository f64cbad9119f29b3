"""The reward card and a user's scoring function that does not work: told, not left out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srppo.errors import ConfigError
from srppo.job import run_diagnose
from srppo.progress import make_progress
from tiny_job import tiny_job

SMALL: dict[str, Any] = {"diagnose__samples": 2, "diagnose__prompts": 2, "diagnose__betas": [1.0], "diagnose__preview": True}
SCORERS = """
import math

def nan(completion, row):
    return math.nan if completion else 0.0

def nothing(completion, row):
    return None if completion else 0.0

def keyed(completion, row):
    return float(completion == row["completion"])

def quoting(completion, row):
    from srppo.scoring import exact_match
    return exact_match(completion, row)
"""


def card(folder: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> dict[str, Any]:
    (folder / "scorers_of_the_card.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(folder))
    config = tiny_job(folder, evaluation__scorer=f"scorers_of_the_card:{function}", **SMALL)
    return run_diagnose(config, progress=make_progress("quiet"))


@pytest.mark.parametrize(("function", "said"), [("nan", "got nan"), ("nothing", "got None")])
def test_a_wrong_score_is_an_error(function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"must return a number in 0..1, {said}"):
        card(tmp_path, monkeypatch, function)


@pytest.mark.parametrize(("function", "warned"), [("keyed", 1), ("quoting", 0)])
def test_a_function_that_fails_on_unlabelled_prompts(
    function: str, warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PPO's prompts have no answer: the held-out ones are scored, and a failure of the user's own is told once."""
    found = card(tmp_path, monkeypatch, function)
    assert {row["group"]: row["accuracy"] is not None for row in found["betas"]} == {"held-out": True, "all": False}
    said = capsys.readouterr().err
    assert said.count("KeyError: 'completion'") == said.count("does without scores on such prompts") == warned

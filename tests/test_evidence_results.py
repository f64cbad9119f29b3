"""The result file of the evidence after a process was killed in the middle of a row, and what may be asked for."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import cases
from benchmarks.evidence.run import Results

ROWS: list[dict[str, Any]] = [{"name": "base", "seed": seed} for seed in (1, 2, 3)]


def test_a_half_written_row_is_left_out_and_dropped_before_the_next(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")
    results.add(ROWS[:2])
    before = results.file.read_bytes()
    results.file.write_bytes(before + b'{"name": "ba')
    assert results.every() == ROWS[:2]
    results.add(ROWS[2:])
    assert results.every() == ROWS and results.file.read_bytes().startswith(before)


def test_a_whole_row_without_its_newline_is_kept(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")
    results.file.write_text(json.dumps(ROWS[0]))
    results.add(ROWS[1:])
    assert results.every() == ROWS and results.file.read_text().count("\n") == 3
    results.file.write_bytes(b'{"half')
    results.add(ROWS)
    assert results.every() == ROWS


def test_shares_of_the_seeds() -> None:
    assert evidence.share("1/1") == (1, 1) and evidence.share("2/3") == (2, 3)
    for wrong in ("0/2", "3/2", "1", "-1/2", "1/2/3", "a/b", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not I/N"):
            evidence.share(wrong)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ppo/eoss", "no such row; there are ppo/eos"),
        ("continued/token", "beside ppo/token no SFT is continued; there are continued/eos"),
        ("eos", "no such row; there are base, sft/"),
        ("continued/nothing", "no such row; there are continued/eos"),
    ],
)
def test_names_that_no_row_has(name: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in (cases.unrunnable(name) or "")
    monkeypatch.setattr(sys, "argv", ["evidence", "--only", name])
    monkeypatch.setattr(evidence, "run_seed", lambda *_: pytest.fail("nothing is to be run"))
    with pytest.raises(SystemExit):
        evidence.main()
    assert words in capsys.readouterr().err


def test_every_name_of_a_question_is_known() -> None:
    assert not [n for names in cases.QUESTIONS.values() for n in names if cases.unrunnable(n)]
    assert not [n for n in cases.CHOICES if cases.unrunnable(n)]
